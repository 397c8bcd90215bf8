//! From a [`ConnInfo`] to a session: which host, encrypted or not, and who takes over when one attempt fails.
//!
//! libpq's rules (`PQconnectPoll` in `src/interfaces/libpq/fe-connect.c`): hosts in their order, of a name every
//! address; a server that cannot be reached or is not of the wanted kind makes room for the next one, a server that
//! refuses does not. `prefer` and `allow` try the other way once where encryption seems to be what was refused.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::conninfo::{Address, ConnInfo, Host, SslMode, TargetSession, socket};
use super::server_error::{INVALID_AUTHORIZATION, ServerError};
use super::tls;
use crate::config::Secret;
use crate::error::{Error, ErrorKind, Result};

/// A peer that vanished is noticed after a minute: while nothing is under way by keepalives (`IDLE + RETRIES *
/// INTERVAL`), while something is by the time that it stays unacknowledged, which would otherwise be a quarter of an
/// hour.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(60);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
/// rustls asks its socket for 4 KiB at a time; this makes one system call of up to sixteen.
const TLS_READ_BYTES: usize = 64 * 1024;

/// A connection's bytes.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<TlsStream<BufReader<TcpStream>>>),
}

impl Stream {
    /// What SCRAM can be bound to; see [`tls::end_point_binding`].
    pub(super) fn binding(&self) -> Option<Vec<u8>> {
        let Self::Tls(stream) = self else { return None };
        tls::end_point_binding(stream.get_ref().1.peer_certificates()?.first()?)
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
        }
    }
}

/// Who the session is for, at the host that was reached.
pub(super) struct Login<'a> {
    pub(super) info: &'a ConnInfo,
    pub(super) host: &'a Host,
    pub(super) password: Option<Secret>,
}

/// Why an attempt failed.
pub(super) struct Failure {
    pub(super) error: Error,
    /// Whether the other choice of encryption may do better.
    encryption_refused: bool,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure { error, encryption_refused: false }
    }
}

impl Login<'_> {
    /// The server answered with an ErrorResponse. pg_hba.conf can ask for encryption, or for none.
    pub(super) fn refused(&self, error: ServerError) -> Failure {
        let encryption_refused = error.sqlstate == INVALID_AUTHORIZATION;
        Failure { error: error.into_error(&format!("Postgres at {} refuses", self.host)), encryption_refused }
    }

    /// The connection broke during start-up.
    pub(super) fn broken(&self, error: io::Error) -> Failure {
        broken(self.host, error)
    }
}

fn broken(host: &Host, error: io::Error) -> Failure {
    match tls::handshake_error(&host.to_string(), &error) {
        Some(error) => Failure { error, encryption_refused: true },
        None => unreachable(host, error).into(),
    }
}

/// What makes a session of a fresh connection: start-up and authentication.
pub(super) trait Startup {
    type Session: Send;

    fn start(&self, stream: Stream, login: &Login<'_>) -> impl Future<Output = Result<Self::Session, Failure>> + Send;

    /// The value of a parameter that the server reported at start-up.
    fn reported<'a>(session: &'a Self::Session, parameter: &str) -> Option<&'a str>;
}

/// Connects to the first host that will do.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] if none can be reached, [`ErrorKind::PostgresDenied`] if one refuses.
pub(super) async fn open<S: Startup + Sync>(info: &ConnInfo, startup: &S) -> Result<S::Session> {
    match info.target {
        TargetSession::PreferStandby => match open_target(info, TargetSession::Standby, startup).await {
            Err(error) if error.kind() == ErrorKind::PostgresAway => {
                open_target(info, TargetSession::Any, startup).await
            }
            outcome => outcome,
        },
        target => open_target(info, target, startup).await,
    }
}

async fn open_target<S: Startup + Sync>(info: &ConnInfo, target: TargetSession, startup: &S) -> Result<S::Session> {
    let mut outcome = Err(Error::new(ErrorKind::PostgresAway, "no host to connect to"));
    for host in &info.hosts {
        outcome = open_host(info, host, startup).await.and_then(|session| {
            let hot_standby = S::reported(&session, "in_hot_standby") == Some("on");
            let read_only = S::reported(&session, "default_transaction_read_only") == Some("on");
            if suits(target, hot_standby, read_only) {
                return Ok(session);
            }
            let message = format!("Postgres at {host} is not what `target_session_attrs` asks for");
            Err(Error::new(ErrorKind::PostgresAway, message))
        });
        match &outcome {
            Err(error) if error.kind() == ErrorKind::PostgresAway => {}
            _ => break,
        }
    }
    outcome
}

/// Servers report both settings since Postgres 14; one that does not is taken for a primary.
fn suits(target: TargetSession, hot_standby: bool, read_only: bool) -> bool {
    match target {
        TargetSession::Any | TargetSession::PreferStandby => true,
        TargetSession::ReadWrite => !hot_standby && !read_only,
        TargetSession::ReadOnly => hot_standby || read_only,
        TargetSession::Primary => !hot_standby,
        TargetSession::Standby => hot_standby,
    }
}

/// Whether to ask for encryption, in the order of the attempts.
fn attempts(info: &ConnInfo, host: &Host) -> &'static [bool] {
    match (&host.address, info.tls.mode) {
        (Address::Unix(_), _) | (_, SslMode::Disable) => &[false],
        (_, SslMode::Allow) => &[false, true],
        (_, SslMode::Prefer) => &[true, false],
        (_, SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull) => &[true],
    }
}

async fn open_host<S: Startup + Sync>(info: &ConnInfo, host: &Host, startup: &S) -> Result<S::Session> {
    let login = Login { info, host, password: super::login::password(info, host).await };
    let attempts = attempts(info, host);
    let mut refused = None;
    for &encrypted in attempts {
        match open_attempt(&login, encrypted, startup).await {
            Ok(session) => return Ok(session),
            // The first refusal says what was wrong with the way that was preferred.
            Err(failure) if failure.encryption_refused => refused = refused.or(Some(failure.error)),
            Err(failure) => return Err(refused.unwrap_or(failure.error)),
        }
    }
    Err(refused.unwrap_or_else(|| Error::new(ErrorKind::PostgresAway, format!("no way to connect to {host}"))))
}

async fn open_attempt<S: Startup + Sync>(
    login: &Login<'_>,
    encrypted: bool,
    startup: &S,
) -> Result<S::Session, Failure> {
    let Login { info, host, .. } = login;
    let stream = reach(host, info.connect_timeout).await?;
    let session = async {
        let stream = match stream {
            Stream::Tcp(stream) if encrypted => encrypt(info, host, stream).await?,
            stream => stream,
        };
        startup.start(stream, login).await
    };
    let late = |_| unreachable(host, io::Error::new(io::ErrorKind::TimedOut, "no answer within `connect_timeout`"));
    timeout(info.connect_timeout, session).await.map_err(late)?
}

fn unreachable(host: &Host, error: io::Error) -> Error {
    Error::new(ErrorKind::PostgresAway, format!("cannot reach Postgres at {host}")).because(error)
}

/// Opens the socket.
async fn reach(host: &Host, limit: Duration) -> Result<Stream> {
    let late = || io::Error::new(io::ErrorKind::TimedOut, "no connection within `connect_timeout`");
    let name = match &host.address {
        Address::Unix(folder) => {
            let connecting = timeout(limit, UnixStream::connect(socket(folder, host.port))).await;
            let stream = connecting.unwrap_or_else(|_| Err(late())).map_err(|error| unreachable(host, error))?;
            return Ok(Stream::Unix(stream));
        }
        Address::Tcp(name) => name.as_str(),
    };
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let resolving = timeout(limit, tokio::net::lookup_host((name, host.port))).await;
    for address in resolving.unwrap_or_else(|_| Err(late())).map_err(|error| unreachable(host, error))? {
        match timeout(limit, TcpStream::connect(address)).await.unwrap_or_else(|_| Err(late())) {
            Ok(stream) => {
                configure(&stream).map_err(|error| unreachable(host, error))?;
                return Ok(Stream::Tcp(stream));
            }
            Err(error) => failed = error,
        }
    }
    Err(unreachable(host, failed))
}

/// Small status updates must not wait for each other, and a peer that vanished must be noticed.
fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    socket.set_tcp_keepalive(&keepalive)
}

/// Asks for TLS and shakes hands. Where the server has none, only `prefer` goes on without.
async fn encrypt(info: &ConnInfo, host: &Host, mut stream: TcpStream) -> Result<Stream, Failure> {
    if !info.tls.direct {
        let mut request = bytes::BytesMut::new();
        postgres_protocol::message::frontend::ssl_request(&mut request);
        stream.write_all(&request).await.map_err(|error| broken(host, error))?;
        // Exactly one byte: whatever an attacker put behind it must not count as encrypted (CVE-2021-23222).
        match stream.read_u8().await.map_err(|error| broken(host, error))? {
            b'S' => {}
            b'N' if matches!(info.tls.mode, SslMode::Prefer) => return Ok(Stream::Tcp(stream)),
            b'N' => {
                let message = format!("Postgres at {host} has no TLS, and `sslmode` wants it");
                return Err(Error::new(ErrorKind::PostgresDenied, message)
                    .hint("set `ssl = on` on the server with `ssl_cert_file` and `ssl_key_file`")
                    .hint("`sslmode=disable` connects without; only where the network is trusted")
                    .into());
            }
            _ => {
                let message = format!("what answers at {host} does not speak Postgres's protocol");
                return Err(Error::new(ErrorKind::Protocol, message).into());
            }
        }
    }
    let Address::Tcp(name) = &host.address else { return Ok(Stream::Tcp(stream)) };
    let connector = TlsConnector::from(tls::client_config(&info.tls)?);
    let name = tls::server_name(name, info.tls.mode)?;
    let stream = BufReader::with_capacity(TLS_READ_BYTES, stream);
    let stream = connector.connect(name, stream).await.map_err(|error| broken(host, error))?;
    Ok(Stream::Tls(Box::new(stream)))
}
