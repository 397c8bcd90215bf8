//! TLS as libpq does it: every `sslmode` right and wrong, client certificates, SCRAM bound to the connection.

use std::fs;

use keepstep::error::ErrorKind;
use keepstep::model::Lsn;
use keepstep::sandbox::Postgres;
use keepstep::source::replication::Walsender;

use crate::source::{connect, execute, info, refused, server, stream_until};

/// Makes two authorities and what they sign. X.509 version 1 is what openssl before 3.2 makes where no extension is
/// given.
const CERTIFICATES: &str = r#"
    set -e
    ec="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for ca in ca stranger; do openssl req -x509 $ec -keyout $ca.key -out $ca.crt -days 30 -subj "/CN=$ca"; done
    leaf() {
        name=$1 by=$2 key=$3 subject=$4 extension=$5 hash=$6
        openssl req $key -nodes -keyout $name.key -out $name.csr -subj "/CN=$subject"
        echo "$extension" > $name.ext
        openssl x509 -req -in $name.csr -CA $by.crt -CAkey $by.key -CAcreateserial -days 30 -out $name.crt $hash \
            ${extension:+-extfile $name.ext}
    }
    here="subjectAltName=DNS:localhost,IP:127.0.0.1"
    leaf server ca "$ec" x "$here" -sha256
    leaf sha384 ca "$ec" x "$here" -sha384
    leaf sha512 ca "-newkey rsa:2048" x "$here" -sha512
    leaf elsewhere ca "$ec" localhost "subjectAltName=DNS:db.example.org" -sha256
    leaf common ca "$ec" localhost "basicConstraints=CA:FALSE" -sha256
    leaf version1 ca "$ec" localhost "" -sha256
    openssl req -x509 $ec -keyout own.key -out own.crt -days 30 -subj /CN=localhost -addext subjectAltName=DNS:localhost
    openssl req -x509 -newkey ed25519 -nodes -keyout ed25519.key -out ed25519.crt -days 30 -subj /CN=localhost
    leaf certified ca "$ec" certified "basicConstraints=CA:FALSE" -sha256
    leaf impostor stranger "$ec" certified "basicConstraints=CA:FALSE" -sha256
    chmod 644 *.crt certified.key impostor.key
"#;

struct Tls {
    postgres: Postgres,
}

impl Tls {
    /// A server that shows the certificate `server`.
    async fn start(sql: &str, hba: &str) -> Self {
        let postgres = server("", sql, hba).await;
        let made = postgres.command("/bin/sh").args(["-c", CERTIFICATES]).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut tls = Tls { postgres };
        tls.show("server");
        tls
    }

    /// From now on it shows another certificate.
    fn show(&mut self, certificate: &str) {
        self.postgres.stop("INT").unwrap();
        let settings = format!(
            "ssl = on\nssl_ca_file = '{}'\nssl_cert_file = '{}'\nssl_key_file = '{}'\n",
            self.file("ca.crt"),
            self.file(&format!("{certificate}.crt")),
            self.file(&format!("{certificate}.key")),
        );
        fs::write(self.postgres.data().join("postgresql.auto.conf"), settings).unwrap();
        self.postgres.resume().unwrap();
    }

    fn file(&self, name: &str) -> String {
        self.postgres.folder().join(name).display().to_string()
    }

    /// `{name}` in the parameters is a file of that name.
    fn url(&self, user: &str, host: &str, parameters: &str) -> String {
        let parameters = parameters.replace('{', &format!("{}/", self.postgres.folder().display())).replace('}', "");
        format!("postgresql://{user}@{host}:{}/postgres?{parameters}", self.postgres.port)
    }

    async fn accepts(&self, host: &str, parameters: &str) {
        let outcome = connect(&self.url("postgres", host, parameters)).await;
        assert_eq!(outcome.expect(parameters), "postgres TLSv1.3", "{parameters}");
    }

    /// Denied, for good, with these words in message or hints.
    async fn denies(&self, host: &str, parameters: &str, words: &str) {
        let error = refused(&self.url("postgres", host, parameters)).await;
        assert_eq!(error.kind(), ErrorKind::PostgresDenied, "{parameters}: {error}");
        let text = format!("{error} {:?}", error.hints());
        assert!(text.contains(words), "{parameters}: {text}");
    }
}

#[tokio::test]
async fn every_sslmode_right_and_wrong() {
    let mut tls = Tls::start("", "").await;
    for mode in ["disable", "allow"] {
        let plain = connect(&tls.url("postgres", "127.0.0.1", &format!("sslmode={mode}"))).await;
        assert_eq!(plain.unwrap(), "postgres plain");
    }
    for right in ["", "sslmode=prefer", "sslmode=require", "ssl=true", "sslmode=require&sslrootcert={ca.crt}"] {
        tls.accepts("127.0.0.1", right).await;
    }
    for host in ["127.0.0.1", "localhost"] {
        tls.accepts(host, "sslmode=verify-ca&sslrootcert={ca.crt}").await;
        tls.accepts(host, "sslmode=verify-full&sslrootcert={ca.crt}").await;
    }
    for wrong in [
        "sslmode=require&sslrootcert={stranger.crt}",
        "sslmode=verify-ca&sslrootcert={stranger.crt}",
        "sslmode=verify-full&sslrootcert={stranger.crt}",
        "sslrootcert=system",
    ] {
        tls.denies("localhost", wrong, "UnknownIssuer").await;
    }
    tls.denies("localhost", "sslmode=verify-full", "sslrootcert=").await;
    tls.denies("localhost", "sslmode=verify-ca&sslrootcert={nowhere.crt}", "nowhere.crt").await;

    tls.show("elsewhere");
    tls.accepts("localhost", "sslmode=verify-ca&sslrootcert={ca.crt}").await;
    tls.denies("localhost", "sslmode=verify-full&sslrootcert={ca.crt}", "made out to").await;
    tls.show("common");
    tls.accepts("localhost", "sslmode=verify-full&sslrootcert={ca.crt}").await;
    tls.denies("127.0.0.1", "sslmode=verify-full&sslrootcert={ca.crt}", "made out to").await;
    tls.show("own");
    tls.accepts("localhost", "sslmode=verify-full&sslrootcert={own.crt}").await;
    tls.denies("127.0.0.1", "sslmode=verify-full&sslrootcert={own.crt}", "made out to").await;
    tls.show("version1");
    tls.accepts("localhost", "sslmode=require").await;
}

#[tokio::test]
async fn prefer_and_allow_do_what_pg_hba_wants() {
    let roles = "create role encrypted login replication; create role plain login replication";
    let tls = Tls::start(roles, "hostnossl all encrypted all reject\nhostssl all plain all reject").await;
    for (user, mode, outcome) in [
        ("encrypted", "prefer", "encrypted TLSv1.3"),
        ("encrypted", "allow", "encrypted TLSv1.3"),
        ("plain", "prefer", "plain plain"),
        ("plain", "allow", "plain plain"),
    ] {
        let connected = connect(&tls.url(user, "127.0.0.1", &format!("sslmode={mode}"))).await;
        assert_eq!(connected.unwrap(), outcome, "{user} {mode}");
    }
    for (user, mode) in [("encrypted", "disable"), ("plain", "require")] {
        let error = refused(&tls.url(user, "127.0.0.1", &format!("sslmode={mode}"))).await;
        assert!(error.to_string().contains("28000"), "{error}");
    }
}

#[tokio::test]
async fn a_server_without_tls() {
    let tls = Tls { postgres: server("", "", "").await };
    assert_eq!(connect(&tls.url("postgres", "127.0.0.1", "sslmode=prefer")).await.unwrap(), "postgres plain");
    tls.denies("127.0.0.1", "sslmode=require", "ssl = on").await;
}

#[tokio::test]
async fn scram_is_bound_to_the_connection() {
    let role = "create role scram login replication password 'secret'; set password_encryption = 'md5';
         create role hashed login replication password 'secret'";
    let hba = "host all scram all scram-sha-256\nhost all hashed all md5";
    let mut tls = Tls::start(role, hba).await;
    let url = |tls: &Tls, user: &str, parameters: &str| tls.url(&format!("{user}:secret"), "127.0.0.1", parameters);
    for certificate in ["server", "sha384", "sha512"] {
        tls.show(certificate);
        let bound = connect(&url(&tls, "scram", "channel_binding=require")).await;
        assert_eq!(bound.unwrap(), "scram TLSv1.3", "{certificate}");
    }
    for parameters in ["", "channel_binding=disable", "sslmode=disable"] {
        assert!(connect(&url(&tls, "scram", parameters)).await.unwrap().starts_with("scram"), "{parameters}");
    }
    for (user, parameters) in
        [("scram", "channel_binding=require&sslmode=disable"), ("hashed", "channel_binding=require")]
    {
        let error = Walsender::connect(&info(&url(&tls, user, parameters))).await.unwrap_err();
        assert!(error.to_string().contains("does not bind"), "{error}");
    }
    // The signature of such a certificate has no hash to bind by.
    tls.show("ed25519");
    assert_eq!(connect(&url(&tls, "scram", "sslmode=require")).await.unwrap(), "scram TLSv1.3");
    let error = Walsender::connect(&info(&url(&tls, "scram", "channel_binding=require"))).await.unwrap_err();
    assert!(error.to_string().contains("does not bind"), "{error}");
}

#[tokio::test]
async fn client_certificates() {
    let tls = Tls::start("create role certified login replication", "hostssl all certified all cert").await;
    let url = |parameters| tls.url("certified", "127.0.0.1", parameters);
    let right = connect(&url("sslmode=require&sslcert={certified.crt}&sslkey={certified.key}")).await;
    assert_eq!(right.unwrap(), "certified TLSv1.3");
    for wrong in [
        "sslmode=require",
        "sslmode=require&sslcert={impostor.crt}&sslkey={impostor.key}",
        "sslmode=require&sslcert={certified.crt}&sslkey={nowhere.key}",
        "sslmode=require&sslcert={certified.crt}&sslkey={impostor.key}",
    ] {
        let error = Walsender::connect(&info(&url(wrong))).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PostgresDenied, "{wrong}: {error}");
        assert_eq!(refused(&url(wrong)).await.kind(), ErrorKind::PostgresDenied, "{wrong}");
    }
}

#[tokio::test]
async fn tls_from_the_first_byte_is_for_postgres_17() {
    let tls = Tls::start("", "").await;
    let url = tls.url("postgres", "127.0.0.1", "sslmode=require&sslnegotiation=direct");
    match tls.postgres.install.major {
        17.. => assert_eq!(connect(&url).await.unwrap(), "postgres TLSv1.3"),
        _ => drop(refused(&url).await),
    }
}

#[tokio::test]
async fn the_stream_flows_over_tls() {
    let sql = "create table t (id int primary key, v text); create publication p for table t;
         select pg_create_logical_replication_slot('s', 'pgoutput')";
    let tls = Tls::start(sql, "").await;
    let info = info(&tls.url("postgres", "localhost", "sslmode=verify-full&sslrootcert={ca.crt}"));
    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "p", Lsn(0)).await.unwrap();
    let insert = "insert into t select n, repeat('x', 1000) from generate_series(1, 5000) n";
    execute(&tls.postgres, &format!("{insert}; insert into t values (0, 'after')")).await;
    let bodies = stream_until(&mut replication, b"after").await;
    assert_eq!(bodies.iter().filter(|body| body[0] == b'I').count(), 5001);
    replication.close(Lsn(0)).await.unwrap();
}
