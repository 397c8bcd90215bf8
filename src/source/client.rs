//! The ordinary connections: `tokio-postgres` over the same hosts, TLS and settings as the replication connection.

use std::convert::Infallible;
use std::future::{Ready, poll_fn, ready};
use std::io;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_postgres::config::{SslMode, SslNegotiation};
use tokio_postgres::tls::{ChannelBinding, TlsConnect, TlsStream};

use tokio_postgres::{AsyncMessage, Client, Connection};

use super::connect::{self, Failure, Login, Startup, Stream};
use super::conninfo::{self, ConnInfo};
use super::login::VALUE_SETTINGS;
use super::query_error;
use super::server_error::ServerError;
use crate::error::{Error, ErrorKind, Result};

/// Connects for ordinary queries. The connection lives in a task of its own and ends when the client is dropped.
///
/// The session's settings are those of the replication connection; `row_security = off` makes a policy that would hide
/// rows an error, and no statement takes longer than `statement_timeout` (zero is no limit).
///
/// # Errors
/// [`crate::error::ErrorKind::PostgresAway`] if no host can be reached,
/// [`crate::error::ErrorKind::PostgresDenied`] if one refuses.
pub async fn connect(info: &ConnInfo, statement_timeout: Duration) -> Result<Client> {
    let Session { client, connection } = connect::open(info, &QueryStartup).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a query connection to Postgres ended");
        }
    });
    set_up(&client, statement_timeout).await?;
    Ok(client)
}

/// The same, for one that LISTENs.
///
/// # Errors
/// As [`connect`].
pub async fn connect_listening(info: &ConnInfo, statement_timeout: Duration) -> Result<(Client, Woken)> {
    let Session { client, mut connection } = connect::open(info, &QueryStartup).await?;
    let (heard, woken) = mpsc::channel(1);
    tokio::spawn(async move {
        loop {
            match poll_fn(|context| connection.poll_message(context)).await {
                // One that has not been heard yet says as much.
                Some(Ok(AsyncMessage::Notification(_))) => _ = heard.try_send(()),
                Some(Ok(_)) => {}
                Some(Err(error)) => return tracing::debug!(%error, "a listening connection to Postgres ended"),
                None => return,
            }
        }
    });
    set_up(&client, statement_timeout).await?;
    Ok((client, Woken(woken)))
}

/// What a connection that LISTENs hears: that somebody has notified it, not what of.
#[derive(Debug)]
pub struct Woken(mpsc::Receiver<()>);

impl Woken {
    /// Waits for it; `None` once the connection has ended. Cancel-safe.
    pub async fn recv(&mut self) -> Option<()> {
        self.0.recv().await
    }
}

async fn set_up(client: &Client, statement_timeout: Duration) -> Result<()> {
    let settings = VALUE_SETTINGS.iter().map(|(name, value)| format!("SET {name} = '{value}';")).collect::<String>();
    let timeout_ms = statement_timeout.as_millis();
    // Compiling a query of the catalog, or a chunk's, takes longer than running it. Where a statement waits for a lock, it has to
    // see what it waited for.
    let settings = format!(
        "{settings} SET row_security = off; SET jit = off; SET statement_timeout = {timeout_ms};
        SET default_transaction_isolation = 'read committed'"
    );
    client.batch_execute(&settings).await.map_err(|error| query_error("cannot set up the session", error))
}

struct QueryStartup;

struct Session {
    client: Client,
    connection: Connection<Stream, Stream>,
}

impl Startup for QueryStartup {
    type Session = Session;

    async fn start(&self, stream: Stream, login: &Login<'_>) -> Result<Session, Failure> {
        let connected = config(login).connect_raw(stream, Established).await;
        let (client, connection) = connected.map_err(|error| failure(login, error))?;
        Ok(Session { client, connection })
    }

    fn reported<'a>(session: &'a Session, parameter: &str) -> Option<&'a str> {
        session.connection.parameter(parameter)
    }
}

fn failure(login: &Login<'_>, error: tokio_postgres::Error) -> Failure {
    if let Some(server) = error.as_db_error() {
        return login.refused(ServerError::from_client(server));
    }
    if error.is_closed() {
        return login.broken(io::ErrorKind::UnexpectedEof.into());
    }
    let cause = error.into_source().unwrap_or_else(|| "it answered with what the protocol does not allow".into());
    let denied = format!("cannot log in to Postgres at {}", login.host);
    match cause.downcast::<io::Error>() {
        // postgres-protocol makes these of a SCRAM exchange that proves nothing; no socket does.
        Ok(scram) if matches!(scram.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Other) => {
            Error::new(ErrorKind::PostgresDenied, denied).because(scram).into()
        }
        Ok(socket) => login.broken(*socket),
        Err(cause) => Error::new(ErrorKind::PostgresDenied, denied).because(cause).into(),
    }
}

fn config(login: &Login<'_>) -> tokio_postgres::Config {
    let info = login.info;
    let mut config = tokio_postgres::Config::new();
    config.user(&info.user).dbname(&info.database).application_name(&info.application_name);
    if let Some(options) = &info.options {
        config.options(options);
    }
    if let Some(password) = &login.password {
        config.password(password.expose());
    }
    config.channel_binding(match info.channel_binding {
        conninfo::ChannelBinding::Disable => tokio_postgres::config::ChannelBinding::Disable,
        conninfo::ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
        conninfo::ChannelBinding::Require => tokio_postgres::config::ChannelBinding::Require,
    });
    // TLS, or none, is there already: these two make tokio-postgres hand the stream to `Established` as it is.
    config.ssl_mode(SslMode::Require).ssl_negotiation(SslNegotiation::Direct);
    config
}

/// Hands over the stream that is connected, encrypted or not.
struct Established;

impl TlsConnect<Stream> for Established {
    type Stream = Stream;
    type Error = Infallible;
    type Future = Ready<std::result::Result<Stream, Infallible>>;

    fn connect(self, stream: Stream) -> Self::Future {
        ready(Ok(stream))
    }
}

impl TlsStream for Stream {
    fn channel_binding(&self) -> ChannelBinding {
        self.binding().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}
