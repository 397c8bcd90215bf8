//! The ways to reach Redis: TLS, ACL users, database numbers, Unix sockets; and being refused.

use std::process::Command;

use redis::AsyncCommands;

use crate::support::{Daemon, Mirror, Stage, assert_in_step, wait_for};

const ROWS: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "name"]
ttl     = "1h"

[rule.again]
table   = "public.rows"
key     = "again:{id}"
value   = "json"
columns = ["id", "name"]
"#;

/// One rule for each kind of command.
const KINDS: &str = r#"
[rule.hash]
table   = "public.rows"
key     = "hash:{id}"
value   = "hash"
columns = ["id", "name"]
ttl     = "1h"

[rule.members]
table  = "public.rows"
key    = "members:{id}"
value  = "set"
member = "{id}"

[rule.ranks]
table  = "public.rows"
key    = "ranks"
value  = "zset"
member = "{id}"
score  = "row.id"

[rule.card]
table   = "public.rows"
key     = "card:{id}"
value   = "json"
columns = ["id"]
write   = "present"
tags    = ["row:{id}"]

[rule.stale]
table       = "public.rows"
delete_tags = ["row:{id}"]
redelete    = "1s"

[rule.told]
table        = "public.rows"
delete_match = ["list:{id}:*"]
bump         = ["generation"]
stream       = { key = "told" }
publish      = { channel = "told" }
"#;

const MIRRORS: [Mirror<'_>; 2] = [
    Mirror { table: "rows", key: "'row:' || id", columns: "id, name" },
    Mirror { table: "rows", key: "'again:' || id", columns: "id, name" },
];

/// Every kind of command passes: sets with and without TTL, deletes, a sweep.
async fn works(stage: &Stage, redis: &str, more: &str, kinds: &str) {
    stage.execute("create table rows (id int primary key, name text)").await;
    let rules = stage.rules_between(&stage.postgres.url("postgres"), redis, &(ROWS.to_owned() + kinds));
    let text = std::fs::read_to_string(&rules).unwrap().replace("\n\n[admin]", &format!("\n{more}\n\n[admin]"));
    std::fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    stage.keepstep(&["check", "--connect"]);
    let _daemon = Daemon::start(stage, &rules).await;
    stage.execute("insert into rows values (1, 'a'), (2, 'b'); delete from rows where id = 1").await;
    stage.execute("truncate rows; insert into rows values (3, 'c')").await;
    wait_for("the keys", async || {
        let mut connection =
            redis::Client::open(stage.redis.url()).unwrap().get_multiplexed_async_connection().await.ok()?;
        if let Some(database) = redis.strip_suffix("/7").map(|_| 7) {
            let () = redis::cmd("SELECT").arg(database).query_async(&mut connection).await.ok()?;
        }
        let held: Vec<Option<String>> = connection.mget(&["test:row:2", "test:row:3", "test:again:3"]).await.ok()?;
        let row = Some(r#"{"id":3,"name":"c"}"#.to_owned());
        (held == [None, row.clone(), row]).then_some(())
    })
    .await;
    stage.keepstep(&["verify"]);
}

#[tokio::test]
async fn an_acl_user_with_just_the_line_that_check_prints() {
    let stage = Stage::set();
    stage.execute("create table rows (id int primary key, name text)").await;
    let rules = stage.rules_between(&stage.postgres.url("postgres"), &stage.redis.url(), &(ROWS.to_owned() + KINDS));
    // A user that may do nothing: check says what it needs.
    let mut cache = stage.cache().await;
    let () =
        redis::cmd("ACL").arg(&["SETUSER", "keepstep", "on", ">s3cret", "+get"]).query_async(&mut cache).await.unwrap();
    let url = format!("redis://keepstep:s3cret@127.0.0.1:{}/", stage.redis.port);
    let text = std::fs::read_to_string(&rules).unwrap().replace(&stage.redis.url(), &url);
    std::fs::write(&rules, text).unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_keepstep")).args(["check", "--connect"]).current_dir(stage.folder()).output();
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() && said.contains("NOPERM"), "{said}");
    let line = said.lines().find_map(|line| line.trim().strip_prefix("hint: ACL ")).expect("the ACL line");
    assert!(!said.contains("s3cret"), "{said}");
    let words: Vec<String> = line.replace(">PASSWORD", ">s3cret").split(' ').map(str::to_owned).collect();
    let () = redis::cmd("ACL").arg(&words).query_async(&mut cache).await.unwrap();
    stage.execute("drop table rows").await;
    works(&stage, &url, "wait_replicas = 0", KINDS).await;
}

#[tokio::test]
async fn another_database_number() {
    let stage = Stage::set();
    let url = format!("{}7", stage.redis.url());
    works(&stage, &url, "", "").await;
}

#[tokio::test]
async fn a_unix_socket() {
    let stage = Stage::set();
    let url = format!("redis+unix://{}", stage.redis.folder().join("redis.sock").display());
    works(&stage, &url, "", "").await;
}

/// An authority and a certificate for 127.0.0.1 that it signs, for the server and for the client.
const CERTIFICATES: &str = r#"
    set -e
    ec="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for ca in ca stranger; do openssl req -x509 $ec -keyout $ca.key -out $ca.crt -days 30 -subj "/CN=$ca"; done
    openssl req $ec -keyout redis.key -out redis.csr -subj /CN=redis
    echo "subjectAltName=DNS:localhost,IP:127.0.0.1" > redis.ext
    openssl x509 -req -in redis.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile redis.ext -out redis.crt
"#;

#[tokio::test]
async fn tls_with_client_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new("/bin/sh").args(["-c", CERTIFICATES]).current_dir(folder.path()).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let file = |name: &str| folder.path().join(name).display().to_string();
    let port = keepstep::sandbox::free_port().unwrap().to_string();
    let (ca, certificate, key) = (file("ca.crt"), file("redis.crt"), file("redis.key"));
    let tls = ["--tls-port", &port, "--tls-ca-cert-file", &ca, "--tls-cert-file", &certificate, "--tls-key-file", &key];
    let stage = Stage::set_with("", &tls);
    let url = format!("rediss://127.0.0.1:{port}/");
    let client = format!("client_cert = \"{certificate}\"\nclient_key = \"{key}\"");
    works(&stage, &url, &format!("ca_file = \"{ca}\"\n{client}"), "").await;
    // A server that somebody else vouches for is refused.
    let stranger = format!("ca_file = \"{}\"\n{client}", file("stranger.crt"));
    let rules = stage.folder().join("keepstep.toml");
    let text = std::fs::read_to_string(&rules).unwrap().replace(&format!("ca_file = \"{ca}\"\n{client}"), &stranger);
    std::fs::write(&rules, text).unwrap();
    let output =
        Command::new(env!("CARGO_BIN_EXE_keepstep")).args(["check", "--connect"]).current_dir(stage.folder()).output();
    let said = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(said.contains("failed") && said.contains("certificate"), "{said}");
}

#[tokio::test]
async fn a_wrong_password_ends_the_daemon_with_the_remedy() {
    let stage = Stage::set_with("", &["--requirepass", "s3cret"]);
    stage.execute("create table rows (id int primary key, name text)").await;
    let url = format!("redis://:wr0ng@127.0.0.1:{}/", stage.redis.port);
    let rules = stage.rules_between(&stage.postgres.url("postgres"), &url, ROWS);
    stage.keepstep(&["setup"]);
    let daemon = Daemon::spawn(&stage, &rules, &[]);
    let log = daemon.log_path();
    assert_eq!(daemon.end().await.code(), Some(1));
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("Redis refuses the user or password") && log.contains("hint:"), "{log}");
    assert!(!log.contains("wr0ng"), "{log}");
}

#[tokio::test]
async fn an_acknowledged_batch_is_on_so_many_replicas() {
    let stage = Stage::set();
    let replica = Stage::set_with("", &["--replicaof", "127.0.0.1", &stage.redis.port.to_string()]);
    stage.execute("create table rows (id int primary key, name text)").await;
    let rules = stage.rules(ROWS);
    let text = std::fs::read_to_string(&rules).unwrap().replace("prefix = ", "wait_replicas = 1\nprefix = ");
    std::fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    let mut primary = stage.cache().await;
    wait_for("the replica", async || {
        let info: String = redis::cmd("INFO").arg("replication").query_async(&mut primary).await.ok()?;
        info.contains("state=online").then_some(())
    })
    .await;
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into rows values (1, 'a')").await;
    assert_in_step(&stage, &MIRRORS).await;
    let held: Option<String> = replica.get("row:1").await;
    assert_eq!(held.as_deref(), Some(r#"{"id":1,"name":"a"}"#));
    // Without it, nothing is acknowledged, and nothing is lost.
    drop(replica);
    stage.execute("insert into rows values (2, 'b')").await;
    wait_for("the warning", async || daemon.log().contains("Redis replicas have the batch").then_some(())).await;
}
