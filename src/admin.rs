//! The HTTP endpoint: metrics, probes, status.
//!
//! Probes and metrics answer any address; everything else answers on loopback, or to whoever sends the token.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{ConnectInfo, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::{Deserialize, Serialize};

use crate::config::{AdminConfig, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::model::{Lsn, Position};

/// `/live` fails if the session has not come round for so long.
const STUCK_AFTER: Duration = Duration::from_secs(60);

/// What the daemon is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Not streaming yet, or not any more.
    #[default]
    Connecting,
    /// Streaming changes into the cache.
    Active,
    /// The end was asked for.
    Ending,
}

/// `/status`, as JSON. All positions are LSNs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Status {
    /// What the daemon is doing.
    pub phase: Phase,
    /// keepstep's version.
    pub version: String,
    /// Postgres's database.
    pub database: String,
    /// The replication slot.
    pub slot: String,
    /// Its `wal_status`.
    pub slot_status: Option<String>,
    /// Bytes of WAL that it makes Postgres keep.
    pub slot_retained_bytes: Option<u64>,
    /// When the unbroken history of slot and cache began, in microseconds since 1970.
    pub epoch: u64,
    /// The end of what Postgres has sent.
    pub received: Lsn,
    /// Everything up to here is in the cache.
    pub applied: Position,
    /// What Postgres was told that it may forget.
    pub acknowledged: Lsn,
    /// Bytes between what Postgres has and what the cache holds.
    pub lag_bytes: u64,
    /// Whether everything received is in the cache.
    pub caught_up: bool,
    /// Whether Redis is away at this moment.
    pub redis_away: bool,
    /// The rules.
    pub rules: Vec<RuleStatus>,
    /// The last failure, of whichever kind.
    pub last_error: Option<String>,
}

/// A rule in `/status`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RuleStatus {
    /// Its name.
    pub name: String,
    /// Its table.
    pub table: String,
    /// Why it only invalidates for now.
    pub paused: Option<String>,
    /// Whether it deleted keys where it should have written them.
    pub owing: bool,
}

/// What the session tells and the endpoint shows.
#[derive(Debug)]
pub struct Shared {
    status: Mutex<Status>,
    came_round: Mutex<Instant>,
}

impl Shared {
    /// At the start of the process.
    pub fn new(status: Status) -> Self {
        Shared { status: Mutex::new(status), came_round: Mutex::new(Instant::now()) }
    }

    /// Changes what is shown.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.status.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What is shown.
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The session has come round.
    pub fn alive(&self) {
        *self.came_round.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn stuck(&self) -> bool {
        self.came_round.lock().unwrap_or_else(PoisonError::into_inner).elapsed() > STUCK_AFTER
    }
}

struct Admin {
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    token: Option<Secret>,
}

/// Binds the address and answers from then on, until the process ends.
pub async fn serve(config: &AdminConfig, shared: Arc<Shared>, metrics: Arc<Metrics>) -> Result<Option<SocketAddr>> {
    let Some(address) = config.listen else { return Ok(None) };
    let cannot = |error| {
        Error::new(ErrorKind::Io, format!("cannot listen on {address}"))
            .because(error)
            .hint("set another address in `[admin] listen`, or \"off\"")
    };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(cannot)?;
    let bound = listener.local_addr().map_err(cannot)?;
    let admin = Arc::new(Admin { shared, metrics, token: config.token.clone() });
    let routes = Router::new()
        .route("/metrics", get(metrics_text))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .route("/status", get(status))
        .with_state(admin);
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, service).await {
            tracing::error!(%error, "the admin endpoint has ended");
        }
    });
    Ok(Some(bound))
}

async fn metrics_text(State(admin): State<Arc<Admin>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], admin.metrics.render()).into_response()
}

async fn live(State(admin): State<Arc<Admin>>) -> Response {
    match admin.shared.stuck() {
        false => (StatusCode::OK, "live\n").into_response(),
        true => (StatusCode::SERVICE_UNAVAILABLE, "nothing has moved for a minute\n").into_response(),
    }
}

#[derive(Deserialize)]
struct ReadyQuery {
    #[serde(default)]
    caught_up: u8,
}

async fn ready(State(admin): State<Arc<Admin>>, Query(query): Query<ReadyQuery>) -> Response {
    let status = admin.shared.status();
    let unready = |why: &'static str| (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    match status.phase {
        Phase::Active if query.caught_up == 1 && !status.caught_up => unready("not caught up\n"),
        Phase::Active => (StatusCode::OK, "ready\n").into_response(),
        Phase::Connecting => unready("connecting\n"),
        Phase::Ending => unready("ending\n"),
    }
}

async fn status(
    State(admin): State<Arc<Admin>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    match allowed(peer, &headers, admin.token.as_ref()) {
        true => axum::Json(admin.shared.status()).into_response(),
        false => (StatusCode::UNAUTHORIZED, "only on loopback, or with `[admin] token`\n").into_response(),
    }
}

/// Loopback without a token, or the right token from anywhere.
fn allowed(peer: SocketAddr, headers: &HeaderMap, token: Option<&Secret>) -> bool {
    let Some(token) = token else { return peer.ip().is_loopback() };
    let sent = headers.get(header::AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    sent.is_some_and(|sent| same(sent, token.expose().as_bytes()))
}

/// Compares without telling by its duration how much was right.
fn same(sent: &[u8], token: &[u8]) -> bool {
    let differing = sent.iter().zip(token).fold(0, |differing, (a, b)| differing | (a ^ b));
    sent.len() == token.len() && differing == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_answers_loopback_or_the_token() {
        let (near, far): (SocketAddr, SocketAddr) =
            ("127.0.0.1:1".parse().expect("an address"), "192.0.2.1:1".parse().expect("an address"));
        let token = Secret::new("s3cret");
        let with = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().expect("a header"))]);
        assert!(allowed(near, &HeaderMap::new(), None));
        assert!(!allowed(far, &HeaderMap::new(), None));
        assert!(allowed(far, &with("Bearer s3cret"), Some(&token)));
        for wrong in ["Bearer s3cre", "Bearer s3cret2", "s3cret", "Bearer "] {
            assert!(!allowed(near, &with(wrong), Some(&token)), "{wrong}");
        }
    }
}
