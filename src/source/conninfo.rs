//! Where Postgres is and how to get in, from the URL that the application already has.
//!
//! URLs are libpq's (the manual's "Connection URIs"), with what other stacks add to them: a driver suffix
//! (`postgresql+asyncpg://`) and parameters of poolers and ORMs, which are dropped and reported. What would weaken the
//! connection if it were dropped is refused. Parameters that the URL leaves out come from libpq's environment
//! variables. A message about a URL never quotes it: a password that was not percent-encoded can end up in any part.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use percent_encoding::percent_decode_str;

use crate::config::{PostgresConfig, Secret};
use crate::error::{Error, ErrorKind, Result};

/// How long one attempt to connect may take where nothing else is said.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// Where Debian's Postgres, and its libpq, have the socket.
const SOCKET_FOLDER_DEFAULT: &str = "/var/run/postgresql";
/// Postgres's port.
const PORT_DEFAULT: u16 = 5432;

/// Everything needed to connect. Shows no secret in `Debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnInfo {
    /// Tried in this order; never empty.
    pub hosts: Vec<Host>,
    /// The role.
    pub user: String,
    /// Its password; without one the password file is looked at.
    pub password: Option<Secret>,
    /// The password file (`~/.pgpass`): `host:port:database:user:password` a line.
    pub password_file: Option<PathBuf>,
    /// The database.
    pub database: String,
    /// Encryption.
    pub tls: TlsSettings,
    /// Whether SCRAM must, may or may not be bound to the TLS connection.
    pub channel_binding: ChannelBinding,
    /// Which servers among `hosts` will do.
    pub target: TargetSession,
    /// How long one attempt at one address may take, and then start-up and authentication together.
    pub connect_timeout: Duration,
    /// What `pg_stat_activity` shows.
    pub application_name: String,
    /// Settings for the session, as `-c name=value`; keepstep's own come after them.
    pub options: Option<String>,
    /// Parameters of the URL that mean nothing here and were dropped, for a warning.
    pub dropped: Vec<String>,
}

/// One server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// How to reach it.
    pub address: Address,
    /// Its port, also the number in the socket's name.
    pub port: u16,
}

/// How to reach a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A host name or an IP address.
    Tcp(String),
    /// The folder of a Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            Address::Tcp(name) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            Address::Tcp(name) => write!(f, "{name}:{}", self.port),
            Address::Unix(folder) => write!(f, "{}", socket(folder, self.port).display()),
        }
    }
}

/// The path of a server's Unix socket.
pub(super) fn socket(folder: &Path, port: u16) -> PathBuf {
    folder.join(format!(".s.PGSQL.{port}"))
}

/// Encryption of the connection. A Unix socket is never encrypted, whatever this says (as in libpq).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsSettings {
    /// `sslmode`
    pub mode: SslMode,
    /// `sslrootcert`
    pub roots: Roots,
    /// `sslcert` and `sslkey` (PEM).
    pub client: Option<ClientCertificate>,
    /// `sslnegotiation=direct`: TLS from the first byte (Postgres 17 and later).
    pub direct: bool,
}

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never encrypted.
    Disable,
    /// Encrypted if the server insists.
    Allow,
    /// Encrypted if the server can.
    Prefer,
    /// Encrypted. The server's certificate is verified only if there are roots to verify it with.
    Require,
    /// And the server's certificate is signed by a trusted root.
    VerifyCa,
    /// And it is made out to the host's name.
    VerifyFull,
}

/// The root certificates that the server's certificate must come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// This file (PEM), which must exist.
    File(PathBuf),
    /// This file if it exists (`~/.postgresql/root.crt`).
    FileIfPresent(PathBuf),
    /// The system's (`sslrootcert=system`).
    System,
    /// None.
    Missing,
}

/// What the client shows to the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    /// `sslcert`: the certificate, with those that lead to its root (PEM).
    pub certificate: PathBuf,
    /// `sslkey`: its private key (PEM, not encrypted).
    pub key: PathBuf,
    /// Whether missing files only mean that there is no certificate (`~/.postgresql/postgresql.crt`).
    pub optional: bool,
}

/// libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelBinding {
    /// Never.
    Disable,
    /// If both sides can.
    Prefer,
    /// Or no connection.
    Require,
}

/// libpq's `target_session_attrs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetSession {
    /// Whichever answers.
    Any,
    /// One that is no standby and whose sessions may write.
    ReadWrite,
    /// One that is a standby or whose sessions may not write.
    ReadOnly,
    /// One that is no standby.
    Primary,
    /// One that is.
    Standby,
    /// A standby, else whichever answers.
    PreferStandby,
}

/// The parameters that mean something here, with libpq's environment variable for each.
const PARAMETERS: [(&str, &str); 17] = [
    // asyncpg's and JDBC's name for sslmode; no variable.
    ("ssl", ""),
    ("host", "PGHOST"),
    ("port", "PGPORT"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("dbname", "PGDATABASE"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("application_name", "PGAPPNAME"),
    ("options", "PGOPTIONS"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
];

/// Parameters that protect the connection, or lead elsewhere, and that keepstep cannot honour.
const REFUSED: [&str; 9] = [
    "hostaddr",
    "require_auth",
    "requirepeer",
    "service",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
];

impl ConnInfo {
    /// From `[postgres]`, with the environment of this process.
    ///
    /// # Errors
    /// [`ErrorKind::Config`]: the URL is malformed or asks for what keepstep cannot do.
    pub fn from_config(config: &PostgresConfig) -> Result<Self> {
        let environment = |name: &str| std::env::var(name).ok();
        let given = Given::collect(config.url.expose(), &environment)?;
        let limited = given.get("connect_timeout").is_some();
        let info = given.resolve(&environment)?;
        Ok(if limited { info } else { ConnInfo { connect_timeout: config.connect_timeout, ..info } })
    }

    /// From a URL, with `environment` for what it leaves out.
    ///
    /// # Errors
    /// [`ErrorKind::Config`]: the URL is malformed or asks for what keepstep cannot do.
    pub fn parse(url: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        Given::collect(url, environment)?.resolve(environment)
    }
}

/// The parameters as given, by name; the last of a name counts.
#[derive(Default)]
struct Given {
    parameters: Vec<(&'static str, String)>,
    dropped: Vec<String>,
}

impl Given {
    /// The URL's parameters, then those of the environment that the URL does not have.
    fn collect(url: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut given = Given::default();
        given.read_url(url)?;
        for (name, variable) in PARAMETERS {
            if given.get(name).is_none() {
                given.set(name, environment(variable).unwrap_or_default());
            }
        }
        Ok(given)
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(given, _)| *given == name).map(|(_, value)| value.as_str())
    }

    fn read_url(&mut self, url: &str) -> Result<()> {
        let (scheme, rest) = url.split_once("://").ok_or_else(not_a_url)?;
        if !matches!(scheme.split('+').next(), Some("postgresql" | "postgres")) {
            return Err(not_a_url());
        }
        let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        if tail.contains('@') {
            return Err(malformed("an `@` stands behind the first `/` or `?` of the Postgres URL")
                .hint("in user and password write `/` as %2F, `?` as %3F, `@` as %40; elsewhere write `@` as %40"));
        }
        let (credentials, hosts) = authority.rsplit_once('@').map_or((None, authority), |(c, h)| (Some(c), h));
        let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
        if let Some(credentials) = credentials {
            let (user, password) = credentials.split_once(':').map_or((credentials, None), |(u, p)| (u, Some(p)));
            self.set("user", decode("user", user)?);
            if let Some(password) = password {
                self.set("password", decode("password", password)?);
            }
        }
        self.read_hosts(hosts)?;
        self.set("dbname", decode("database", path.strip_prefix('/').unwrap_or(path))?);
        query.split('&').filter(|pair| !pair.is_empty()).try_for_each(|pair| self.read_parameter(pair))
    }

    /// Empty parts of a URL, and empty variables, mean "not given" (as in libpq).
    fn set(&mut self, name: &'static str, value: String) {
        if !value.is_empty() {
            self.parameters.push((name, value));
        }
    }

    /// `host:port,[::1]:port,…` as the comma-separated lists that the parameters `host` and `port` hold.
    fn read_hosts(&mut self, text: &str) -> Result<()> {
        let mut hosts = Vec::new();
        let mut ports = Vec::new();
        for host in text.split(',') {
            let (name, port) = match host.strip_prefix('[') {
                Some(v6) => {
                    let (name, port) = v6.split_once(']').ok_or_else(|| malformed("the host lacks its `]`"))?;
                    (name, port.strip_prefix(':').unwrap_or(port))
                }
                None => host.rsplit_once(':').unwrap_or((host, "")),
            };
            hosts.push(decode("host", name)?);
            ports.push(port);
        }
        if hosts.iter().any(|host| !host.is_empty()) {
            self.set("host", hosts.join(","));
        }
        if ports.iter().any(|port| !port.is_empty()) {
            self.set("port", ports.join(","));
        }
        Ok(())
    }

    fn read_parameter(&mut self, pair: &str) -> Result<()> {
        let (name, value) =
            pair.split_once('=').ok_or_else(|| malformed("a parameter of the Postgres URL has no `=`"))?;
        let (name, value) = (decode("parameter's name", name)?, decode("parameter", value)?);
        if REFUSED.contains(&name.as_str()) || (name == "gssencmode" && value == "require") {
            return Err(malformed(format!("the Postgres URL has the parameter `{name}`, which keepstep does not do"))
                .hint("take it out if the connection is safe without it"));
        }
        match PARAMETERS.iter().find(|(known, _)| *known == name) {
            Some((known, _)) => self.parameters.push((known, value)),
            None => self.dropped.push(name),
        }
        Ok(())
    }

    fn resolve(self, environment: &dyn Fn(&str) -> Option<String>) -> Result<ConnInfo> {
        let hosts = self.hosts()?;
        let home = environment("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let user = self.get("user").map(str::to_owned).or_else(|| environment("USER"));
        let user = user.filter(|user| !user.is_empty()).ok_or_else(|| malformed("the Postgres URL names no user"))?;
        let own = |name| self.get(name).map(str::to_owned);
        Ok(ConnInfo {
            hosts,
            password: self.get("password").map(Secret::new),
            password_file: own("passfile").map(PathBuf::from).or_else(|| Some(home.clone()?.join(".pgpass"))),
            database: own("dbname").unwrap_or_else(|| user.clone()),
            tls: self.tls(home.map(|home| home.join(".postgresql")))?,
            channel_binding: self.choice("channel_binding", &CHANNEL_BINDINGS, ChannelBinding::Prefer)?,
            target: self.choice("target_session_attrs", &TARGETS, TargetSession::Any)?,
            connect_timeout: self.connect_timeout()?,
            application_name: own("application_name").unwrap_or_else(|| "keepstep".to_owned()),
            options: own("options"),
            user,
            dropped: self.dropped,
        })
    }

    fn hosts(&self) -> Result<Vec<Host>> {
        let names: Vec<&str> = self.get("host").unwrap_or("").split(',').collect();
        let ports: Vec<&str> = self.get("port").unwrap_or("").split(',').collect();
        if ports.len() != 1 && ports.len() != names.len() {
            return Err(malformed("the Postgres URL gives neither one port nor one for each host"));
        }
        let port = |place: usize| match *ports.get(place).unwrap_or(&ports[0]) {
            "" => Ok(PORT_DEFAULT),
            digits => digits.parse().ok().filter(|&port| port != 0).ok_or_else(|| {
                malformed("a port in the Postgres URL is not a number from 1 to 65535")
                    .hint("in user and password write `/` as %2F, `?` as %3F, `:` as %3A, `@` as %40")
            }),
        };
        names.iter().enumerate().map(|(place, name)| Ok(Host { address: address(name), port: port(place)? })).collect()
    }

    fn tls(&self, folder: Option<PathBuf>) -> Result<TlsSettings> {
        let roots = match (self.get("sslrootcert"), &folder) {
            (Some("system"), _) => Roots::System,
            (Some(file), _) => Roots::File(file.into()),
            (None, Some(folder)) => Roots::FileIfPresent(folder.join("root.crt")),
            (None, None) => Roots::Missing,
        };
        let fallback = if roots == Roots::System { SslMode::VerifyFull } else { SslMode::Prefer };
        let fallback = self.choice("ssl", &SSL, fallback)?;
        let mode = self.choice("sslmode", &SSL_MODES, fallback)?;
        if roots == Roots::System && mode != SslMode::VerifyFull {
            return Err(malformed("`sslrootcert=system` needs `sslmode=verify-full`").hint(
                "anyone can get a certificate that the system trusts: without the host's name it proves nothing",
            ));
        }
        let direct = self.choice("sslnegotiation", &[("postgres", false), ("direct", true)], false)?;
        if direct && matches!(mode, SslMode::Disable | SslMode::Allow | SslMode::Prefer) {
            return Err(malformed("`sslnegotiation=direct` needs `sslmode=require` or stronger"));
        }
        Ok(TlsSettings { mode, roots, client: self.client_certificate(folder), direct })
    }

    fn client_certificate(&self, folder: Option<PathBuf>) -> Option<ClientCertificate> {
        let file = |name: &str, default: &str| match (self.get(name), &folder) {
            (Some(path), _) => Some(PathBuf::from(path)),
            (None, Some(folder)) => Some(folder.join(default)),
            (None, None) => None,
        };
        let optional = self.get("sslcert").is_none();
        let certificate = file("sslcert", "postgresql.crt")?;
        Some(ClientCertificate { certificate, key: file("sslkey", "postgresql.key")?, optional })
    }

    fn connect_timeout(&self) -> Result<Duration> {
        let Some(text) = self.get("connect_timeout") else { return Ok(CONNECT_TIMEOUT_DEFAULT) };
        let seconds = text.trim().parse::<u16>().ok().filter(|&seconds| seconds != 0);
        let seconds = seconds.ok_or_else(|| malformed("`connect_timeout` must be seconds from 1 to 65535"))?;
        Ok(Duration::from_secs(seconds.into()))
    }

    fn choice<T: Copy>(&self, name: &str, choices: &[(&str, T)], default: T) -> Result<T> {
        let Some(value) = self.get(name) else { return Ok(default) };
        choices.iter().find(|(known, _)| *known == value).map(|(_, choice)| *choice).ok_or_else(|| {
            let known: Vec<&str> = choices.iter().map(|(known, _)| *known).collect();
            malformed(format!("`{name}` of the Postgres connection must be one of {}", known.join(", ")))
        })
    }
}

const SSL_MODES: [(&str, SslMode); 6] = [
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

/// `ssl=true` is libpq's for JDBC URLs, the modes are asyncpg's.
const SSL: [(&str, SslMode); 8] = [
    ("true", SslMode::Require),
    ("false", SslMode::Disable),
    SSL_MODES[0],
    SSL_MODES[1],
    SSL_MODES[2],
    SSL_MODES[3],
    SSL_MODES[4],
    SSL_MODES[5],
];

const CHANNEL_BINDINGS: [(&str, ChannelBinding); 3] =
    [("disable", ChannelBinding::Disable), ("prefer", ChannelBinding::Prefer), ("require", ChannelBinding::Require)];

const TARGETS: [(&str, TargetSession); 6] = [
    ("any", TargetSession::Any),
    ("read-write", TargetSession::ReadWrite),
    ("read-only", TargetSession::ReadOnly),
    ("primary", TargetSession::Primary),
    ("standby", TargetSession::Standby),
    ("prefer-standby", TargetSession::PreferStandby),
];

fn address(name: &str) -> Address {
    match name {
        "" => Address::Unix(SOCKET_FOLDER_DEFAULT.into()),
        folder if folder.starts_with('/') => Address::Unix(folder.into()),
        name => Address::Tcp(name.to_owned()),
    }
}

fn malformed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

fn not_a_url() -> Error {
    malformed("the Postgres URL does not begin with `postgresql://`")
        .hint("write it as postgresql://USER:PASSWORD@HOST:5432/DATABASE?sslmode=verify-full")
}

/// Undoes percent-encoding; `part` says what it is, for the message.
fn decode(part: &str, text: &str) -> Result<String> {
    let hex = |place: usize| text.as_bytes().get(place).is_some_and(u8::is_ascii_hexdigit);
    let broken = text.match_indices('%').any(|(place, _)| !hex(place + 1) || !hex(place + 2));
    let decoded = (!broken).then(|| percent_decode_str(text).decode_utf8().ok()).flatten();
    let decoded = decoded.filter(|decoded| !decoded.contains('\0'));
    decoded.map(Into::into).ok_or_else(|| {
        malformed(format!("the {part} in the Postgres URL is not percent-encoded UTF-8 text"))
            .hint("write a `%` that stands for itself as %25")
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn parse_in(url: &str, environment: &[(&str, &str)]) -> Result<ConnInfo> {
        let value =
            |name: &str| environment.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        ConnInfo::parse(url, &value)
    }

    fn parse(url: &str) -> ConnInfo {
        parse_in(url, &[]).expect(url)
    }

    fn hosts(url: &str) -> Vec<String> {
        parse(url).hosts.iter().map(Host::to_string).collect()
    }

    #[test]
    fn urls_are_libpqs() {
        let info =
            parse("postgresql://app:p%40ss%2Fword@db.example.org:6432/shop?sslmode=verify-full&connect_timeout=3");
        assert_eq!((info.user.as_str(), info.database.as_str()), ("app", "shop"));
        assert_eq!(info.password, Some(Secret::new("p@ss/word")));
        assert_eq!((info.tls.mode, info.connect_timeout), (SslMode::VerifyFull, Duration::from_secs(3)));
        for (url, expected) in [
            ("postgres://u@h", &["h:5432"][..]),
            ("postgresql+asyncpg://u@h:1/d", &["h:1"]),
            ("postgresql://u@a:1,b,[::1]:3/d", &["a:1", "b:5432", "[::1]:3"]),
            ("postgresql://u@[::1]/d", &["[::1]:5432"]),
            ("postgresql://u@a,b:7/d", &["a:5432", "b:7"]),
            ("postgresql:///d?host=a,b&port=7&user=u", &["a:7", "b:7"]),
            ("postgresql:///d?host=/run/pg&user=u", &["/run/pg/.s.PGSQL.5432"]),
            ("postgresql://u@%2Frun%2Fpg:6432/d", &["/run/pg/.s.PGSQL.6432"]),
            ("postgresql://u@/d", &["/var/run/postgresql/.s.PGSQL.5432"]),
            ("postgresql://u@h?host=other", &["other:5432"]),
        ] {
            assert_eq!(hosts(url), expected, "{url}");
        }
        assert_eq!(parse("postgresql://u:a@b@h/d").password, Some(Secret::new("a@b")));
        assert_eq!(parse("postgresql://u@h").database, "u");
        assert_eq!(parse("postgresql://h/d?user=u&password=a:b").password, Some(Secret::new("a:b")));
    }

    #[test]
    fn what_orms_and_poolers_add_is_dropped_and_reported() {
        let info = parse("postgresql://u@h/d?schema=public&pgbouncer=true&connection_limit=5&application_name=a");
        assert_eq!(info.dropped, ["schema", "pgbouncer", "connection_limit"]);
        assert_eq!(info.application_name, "a");
    }

    #[test]
    fn the_environment_fills_in_what_the_url_leaves_out() {
        let environment =
            [("PGPASSWORD", "secret"), ("PGHOST", "ignored"), ("PGSSLMODE", "require"), ("PGUSER", ""), ("USER", "me")];
        let info = parse_in("postgresql://h/d", &environment).unwrap();
        assert_eq!(info.hosts[0].to_string(), "h:5432");
        assert_eq!((info.password, info.user.as_str()), (Some(Secret::new("secret")), "me"));
        assert_eq!(info.tls.mode, SslMode::Require);
    }

    #[test]
    fn certificates_have_libpqs_places() {
        let at_home = parse_in("postgresql://u@h/d", &[("HOME", "/home/me")]).unwrap();
        assert_eq!(at_home.tls.roots, Roots::FileIfPresent("/home/me/.postgresql/root.crt".into()));
        assert_eq!(at_home.password_file, Some("/home/me/.pgpass".into()));
        assert!(at_home.tls.client.is_some_and(|client| client.optional));
        let given = parse("postgresql://u@h/d?sslcert=/a&sslkey=/b&sslrootcert=/c").tls;
        assert_eq!(given.roots, Roots::File("/c".into()));
        assert!(given.client.is_some_and(|client| !client.optional));
        assert_eq!(parse("postgresql://u@h/d?sslrootcert=system").tls.mode, SslMode::VerifyFull);
        assert_eq!(parse("postgresql://u@h/d?ssl=true").tls.mode, SslMode::Require);
    }

    #[test]
    fn mistakes_are_named_without_the_password() {
        for (url, word) in [
            ("secret", "postgresql://"),
            ("mysql://u:secret@h/d", "postgresql://"),
            ("host=h password=secret", "postgresql://"),
            ("postgresql://u:sec/ret@h/d", "%2F"),
            ("postgresql://u:sec?secret@h/d", "%3F"),
            ("postgresql://u:secret/x", "port"),
            ("postgresql://u:%secret@h/d", "%25"),
            ("postgresql://u:secret%00@h/d", "%25"),
            ("postgresql://u:secret%ff@h/d", "%25"),
            ("postgresql://u@h:0/d?password=secret", "port"),
            ("postgresql://u@h:99999/d?password=secret", "port"),
            ("postgresql://u@a:1,b:2/d?password=secret&host=c", "port"),
            ("postgresql://u@[::1/d?password=secret", "]"),
            ("postgresql://u@h/d?password=secret&secret", "="),
            ("postgresql://h/d?password=secret", "user"),
            ("postgresql://u:secret@h/d?sslmode=on", "verify-full"),
            ("postgresql://u:secret@h/d?sslmode=require&sslrootcert=system", "verify-full"),
            ("postgresql://u:secret@h/d?sslnegotiation=direct", "sslmode=require"),
            ("postgresql://u:secret@h/d?sslcrl=/x", "sslcrl"),
            ("postgresql://u:secret@h/d?gssencmode=require", "gssencmode"),
            ("postgresql://u:secret@h/d?connect_timeout=soon", "connect_timeout"),
        ] {
            let error = parse_in(url, &[]).expect_err(url);
            let text = format!("{error} {:?} {error:?}", error.hints());
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(text.contains(word), "{url}: {text}");
            assert!(!text.contains("secret"), "{url}: {text}");
        }
        let info = parse("postgresql://u:secret@h/d");
        assert!(!format!("{info:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn any_text_gives_an_answer(text in ".*") {
            let _ = parse_in(&text, &[]);
        }

        #[test]
        fn anything_behind_the_scheme_gives_an_answer(rest in "[a-z0-9@:/?&=%,\\[\\]+#. ]*") {
            if let Ok(info) = parse_in(&format!("postgresql://{rest}"), &[("USER", "u")]) {
                prop_assert!(!info.hosts.is_empty());
            }
        }

        #[test]
        fn encoded_credentials_come_back(user in "[^\\x00]{1,20}", password in "[^\\x00]{1,20}") {
            let encode = |text: &str| {
                percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
            };
            let info = parse(&format!("postgresql://{}:{}@h/d", encode(&user), encode(&password)));
            prop_assert_eq!(info.user, user);
            prop_assert_eq!(info.password, Some(Secret::new(password)));
        }
    }
}
