//! One connection to a standalone Redis or Valkey, and what its errors mean.
//!
//! **Architecture invariant:** an error text of the server is shown only up to the arguments that it quotes, because
//! these are keys and values.

use std::fs;
use std::path::Path;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, Cmd, IntoConnectionInfo, Pipeline, ServerError, Value};

use crate::config::RedisConfig;
use crate::error::{Error, ErrorKind, Result};

/// How long connecting, authenticating and choosing the database may take together.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Why a command did not do what it should.
#[derive(Debug)]
pub enum Failure {
    /// The server is away or not ready; what was sent may or may not have been done.
    Away(Error),
    /// `maxmemory` is reached: writes are refused, deletes are not.
    OutOfMemory,
    /// A key is of another type than the command is for.
    WrongType,
    /// EXEC answered nil: the fence or the checkpoint changed since it was looked at.
    Changed,
    /// Trying again would not help.
    Final(Error),
}

/// What every command goes through.
#[derive(Clone)]
pub struct Connection {
    inner: MultiplexedConnection,
}

impl Connection {
    /// Connects as `[redis]` says.
    pub async fn open(config: &RedisConfig) -> Result<Self, Failure> {
        let client = client(config).map_err(Failure::Final)?;
        let settings = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_LIMIT))
            .set_response_timeout(Some(config.timeout));
        match client.get_multiplexed_async_connection_with_config(&settings).await {
            Ok(inner) => Ok(Connection { inner }),
            Err(error) => Err(connect_failure(&error)),
        }
    }

    /// Sends the commands in one piece; one reply each, none of them an error.
    pub async fn send(&mut self, commands: impl IntoIterator<Item = Cmd>) -> Result<Vec<Value>, Failure> {
        let mut pipeline = Pipeline::new();
        for command in commands {
            pipeline.add_command(command);
        }
        // An answer to nothing would never come.
        if pipeline.is_empty() {
            return Ok(Vec::new());
        }
        let replies = self.inner.send_packed_commands(&pipeline, 0, pipeline.len()).await;
        let replies = replies.map_err(|error| Failure::Away(away("the connection to Redis was lost", &error)))?;
        if replies.len() != pipeline.len() {
            let count = format!("Redis sent {} replies to {} commands", replies.len(), pipeline.len());
            return Err(Failure::Away(Error::new(ErrorKind::RedisAway, count)));
        }
        // The first error is the cause; EXECABORT behind it only follows from it.
        match replies.iter().find_map(first_error) {
            Some(error) => Err(server_failure(error)),
            None => Ok(replies),
        }
    }

    /// Sends one command.
    pub async fn send_one(&mut self, command: Cmd) -> Result<Value, Failure> {
        Ok(self.send([command]).await?.swap_remove(0))
    }
}

/// The first error in a reply, however deep: EXEC's errors stand inside its array.
fn first_error(value: &Value) -> Option<&ServerError> {
    match value {
        Value::ServerError(error) => Some(error),
        Value::Array(values) => values.iter().find_map(first_error),
        _ => None,
    }
}

/// What an error reply asks for (every reply is looked at).
fn server_failure(error: &ServerError) -> Failure {
    let said = said(error);
    let away = |what: &str| Failure::Away(Error::new(ErrorKind::RedisAway, format!("Redis {what} ({said})")));
    let denied = |what: String| Error::new(ErrorKind::RedisDenied, what);
    match error.code() {
        "LOADING" => away("is still loading its data"),
        "READONLY" => away("is a replica, not the primary"),
        "MASTERDOWN" => away("has lost its primary"),
        "BUSY" => away("is busy with a script"),
        "MISCONF" => away("refuses writes because it cannot save to disk"),
        "NOREPLICAS" => away("refuses writes because too few replicas are connected"),
        "CLUSTERDOWN" | "TRYAGAIN" => away("Cluster is not ready"),
        "OOM" => Failure::OutOfMemory,
        "WRONGTYPE" => Failure::WrongType,
        // RedisJSON's has no code at all, or not one of its own: `Existing key has wrong Redis type`.
        _ if said.ends_with("key has wrong Redis type") => Failure::WrongType,
        "UNBLOCKED" => away("was demoted while it waited for replicas"),
        "ERR" if said.contains("WAIT cannot be used") => away("is a replica, not the primary"),
        // The state changed between queueing and EXEC: what follows the colon is the cause. Sent again, it shows itself.
        "EXECABORT" if said.contains("because of:") => away("refused the transaction"),
        "MOVED" | "ASK" | "CROSSSLOT" => Failure::Final(
            denied("this Redis is a node of a Cluster".to_owned())
                .hint("this version writes to a standalone server; name one in `[redis] url`"),
        ),
        "NOPERM" => Failure::Final(
            denied(format!("Redis refuses a command to this user ({said})"))
                .hint("`keepstep check --connect` prints the ACL line that the rules need"),
        ),
        "NOAUTH" | "WRONGPASS" => Failure::Final(
            denied(format!("Redis refuses the user or password ({said})"))
                .hint("check the user and password in `[redis] url`: redis://USER:PASSWORD@HOST:PORT/DB"),
        ),
        _ => Failure::Final(denied(format!("Redis refuses a command: {said}"))),
    }
}

/// The server's words.
fn said(error: &ServerError) -> String {
    unquoted(error.code(), error.details().unwrap_or_default())
}

/// An error of the server without the arguments that some of its texts quote.
fn unquoted(code: &str, details: &str) -> String {
    let end = [", with args", "'", "\""].iter().filter_map(|mark| details.find(mark)).min();
    format!("{code} {}", &details[..end.unwrap_or(details.len())]).trim_end().to_owned()
}

fn connect_failure(error: &redis::RedisError) -> Failure {
    use redis::{ErrorKind as Kind, ServerErrorKind};
    let refused = matches!(error.kind(), Kind::AuthenticationFailed)
        || matches!(error.code(), Some("NOAUTH" | "WRONGPASS" | "NOPERM"));
    let not_ready =
        matches!(error.kind(), Kind::Io | Kind::Server(ServerErrorKind::BusyLoading | ServerErrorKind::MasterDown))
            || error.is_timeout()
            || error.is_connection_dropped();
    match (refused, not_ready) {
        (true, _) => Failure::Final(
            Error::new(ErrorKind::RedisDenied, "Redis refuses the user or password")
                .hint("check the user and password in `[redis] url`: redis://USER:PASSWORD@HOST:PORT/DB"),
        ),
        (false, true) => Failure::Away(away("cannot reach Redis", error)),
        (false, false) => Failure::Final(denied("cannot set up the connection to Redis", error)),
    }
}

fn away(what: &str, error: &redis::RedisError) -> Error {
    Error::new(ErrorKind::RedisAway, what).because(cause(error))
}

fn denied(what: &str, error: &redis::RedisError) -> Error {
    Error::new(ErrorKind::RedisDenied, what).because(cause(error))
}

/// What may be said of an error: a socket's words, or the server's without what it quotes.
fn cause(error: &redis::RedisError) -> String {
    match error.code() {
        Some(code) => unquoted(code, error.detail().unwrap_or_default()),
        None if error.is_io_error() => error.to_string(),
        None => error.category().to_owned(),
    }
}

/// The client for `[redis]`: nothing is sent yet.
fn client(config: &RedisConfig) -> Result<Client> {
    let url = config.url.expose();
    let invalid = |error: &redis::RedisError| {
        Error::new(ErrorKind::Config, format!("`[redis] url` is not usable: {}", error.category())).hint(
            "use redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://… for TLS, or redis+unix:///PATH/TO/SOCKET?db=0",
        )
    };
    let info = url.into_connection_info().map_err(|error| invalid(&error))?;
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    // Without CLIENT SETINFO there is one permission less to give.
    let settings = info.redis_settings().clone().set_skip_set_lib_name();
    let info = info.set_tcp_settings(tcp).set_redis_settings(settings);
    let tls = matches!(info.addr(), redis::ConnectionAddr::TcpTls { .. });
    if !tls {
        return Client::open(info).map_err(|error| invalid(&error));
    }
    let client_tls = match &config.client_certificate {
        None => None,
        Some((certificate, key)) => {
            Some(redis::ClientTlsConfig { client_cert: read_pem(certificate)?, client_key: read_pem(key)? })
        }
    };
    let root_cert = config.ca_file.as_deref().map(read_pem).transpose()?;
    let certificates = redis::TlsCertificates { client_tls, root_cert };
    Client::build_with_tls(info, certificates).map_err(|error| denied("cannot set up TLS for Redis", &error))
}

fn read_pem(path: &Path) -> Result<Vec<u8>> {
    let unreadable = |error| Error::new(ErrorKind::Config, format!("cannot read `{}`", path.display())).because(error);
    fs::read(path).map_err(unreadable)
}
