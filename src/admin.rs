//! The HTTP endpoint: metrics, probes, status, and commands.
//!
//! Probes and metrics answer any address; everything else answers on loopback, or to whoever sends the token, and never a
//! web page: what a browser sends for one says where it comes from.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, FromRequestParts, Query, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use serde::{Deserialize, Serialize};

use crate::config::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::model::{Lsn, Position};
use crate::session::desk::{Desk, Pass, Refused};
use crate::session::orders::PassRequest;

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
    /// Whether no rule has keys left to write or to check.
    pub warm_done: bool,
    /// The tables that are read just now.
    pub passes: Vec<PassStatus>,
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
    /// Why it is paused.
    pub paused: Option<String>,
    /// Whether its keys are yet to be made right from its table.
    pub owing: bool,
}

/// A table in `/status` that is being read.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PassStatus {
    /// The table.
    pub table: String,
    /// The rules that it is read for.
    pub rules: Vec<String>,
    /// What for: `warm`, `reconcile` or `verify`.
    pub purpose: String,
    /// Rows read so far.
    pub rows: u64,
    /// How many there are, by Postgres's estimate.
    pub rows_total: u64,
    /// Rows a second since it began.
    pub rows_per_s: f64,
    /// How long it takes still, in seconds, if it goes on like this; unknown before the first row.
    pub seconds_left: Option<u64>,
}

impl PassStatus {
    /// So many rows have been read in so long. An estimate that they are beyond is corrected.
    pub fn advance(&mut self, rows: u64, elapsed: Duration) {
        self.rows = rows;
        self.rows_total = self.rows_total.max(rows);
        self.rows_per_s = rows as f64 / elapsed.as_secs_f64().max(f64::EPSILON);
        let left = (self.rows_total - rows) as f64;
        self.seconds_left = (rows > 0).then(|| (left / self.rows_per_s).ceil() as u64);
    }
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
    desk: Arc<Desk>,
}

/// Binds the address and answers from then on, until the process ends.
pub async fn serve(desk: Arc<Desk>, shared: Arc<Shared>, metrics: Arc<Metrics>) -> Result<Option<SocketAddr>> {
    let Some(address) = desk.config().admin.listen else { return Ok(None) };
    let cannot = |error| {
        Error::new(ErrorKind::Io, format!("cannot listen on {address}"))
            .because(error)
            .hint("set another address in `[admin] listen`, or \"off\"")
    };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(cannot)?;
    let bound = listener.local_addr().map_err(cannot)?;
    let admin = Arc::new(Admin { shared, metrics, desk });
    let routes = Router::new()
        .route("/metrics", get(metrics_text))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .route("/status", get(status))
        .route("/warm", post(warm))
        .route("/verify", post(verify))
        .route("/reload", post(reload))
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
    #[serde(default)]
    warm: u8,
}

async fn ready(State(admin): State<Arc<Admin>>, Query(query): Query<ReadyQuery>) -> Response {
    let status = admin.shared.status();
    let unready = |why: &'static str| (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    match status.phase {
        Phase::Active if query.caught_up == 1 && !status.caught_up => unready("not caught up\n"),
        Phase::Active if query.warm == 1 && !status.warm_done => unready("not warm\n"),
        Phase::Active => (StatusCode::OK, "ready\n").into_response(),
        Phase::Connecting => unready("connecting\n"),
        Phase::Ending => unready("ending\n"),
    }
}

async fn status(_: Trusted, State(admin): State<Arc<Admin>>) -> Response {
    axum::Json(admin.shared.status()).into_response()
}

/// Parameters, in their order, each as often as it is given.
type Parameters = Query<Vec<(String, String)>>;

async fn warm(_: Trusted, State(admin): State<Arc<Admin>>, Query(parameters): Parameters) -> Response {
    pass(&admin, PassRequest::warm(&parameters))
}

async fn verify(_: Trusted, State(admin): State<Arc<Admin>>, Query(parameters): Parameters) -> Response {
    pass(&admin, PassRequest::verify(&parameters))
}

/// The reports of a pass as they come, a JSON object a line. Whoever hangs up ends it.
fn pass(admin: &Admin, request: Result<PassRequest>) -> Response {
    match request.map_err(Refused::Senseless).and_then(|request| admin.desk.pass(&request)) {
        Ok(pass) => ([(header::CONTENT_TYPE, "application/x-ndjson")], lines(pass)).into_response(),
        Err(refused) => refusal(&refused),
    }
}

fn lines(pass: Pass) -> Body {
    Body::from_stream(stream::unfold(pass, |mut pass| async move {
        let report = pass.reports.next().await?;
        let mut line = serde_json::to_vec(&report).expect("a report has only string keys");
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), pass))
    }))
}

async fn reload(_: Trusted, State(admin): State<Arc<Admin>>) -> Response {
    match admin.desk.reload().await {
        Ok(reloaded) => axum::Json(reloaded).into_response(),
        Err(refused) => refusal(&refused),
    }
}

fn refusal(refused: &Refused) -> Response {
    let hints = match refused {
        Refused::Senseless(error) | Refused::Unavailable(error) => error.hints(),
        Refused::Busy | Refused::NotStreaming(_) | Refused::Unusable(_) => &[],
    };
    let hints: String = hints.iter().map(|hint| format!("hint: {hint}\n")).collect();
    let status = match refused {
        Refused::Senseless(_) => StatusCode::BAD_REQUEST,
        Refused::Busy => StatusCode::CONFLICT,
        Refused::NotStreaming(_) => StatusCode::SERVICE_UNAVAILABLE,
        Refused::Unusable(_) => StatusCode::UNPROCESSABLE_ENTITY,
        Refused::Unavailable(_) => StatusCode::BAD_GATEWAY,
    };
    (status, format!("{refused}\n{hints}")).into_response()
}

/// Proof that whoever asks may see and command.
struct Trusted;

impl FromRequestParts<Arc<Admin>> for Trusted {
    type Rejection = (StatusCode, &'static str);

    async fn from_request_parts(parts: &mut Parts, admin: &Arc<Admin>) -> Result<Self, Self::Rejection> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        let config = admin.desk.config();
        if !peer.is_some_and(|ConnectInfo(peer)| allowed(*peer, &parts.headers, config.admin.token.as_ref())) {
            return Err((StatusCode::UNAUTHORIZED, "only on loopback, or with `[admin] token`\n"));
        }
        if parts.method != Method::GET && parts.headers.contains_key(header::ORIGIN) {
            return Err((StatusCode::FORBIDDEN, "commands are not taken from web pages\n"));
        }
        Ok(Trusted)
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

    #[test]
    fn a_pass_says_how_long_it_takes_still() {
        let mut pass = PassStatus { rows_total: 1000, ..PassStatus::default() };
        pass.advance(0, Duration::ZERO);
        assert_eq!((pass.rows_per_s, pass.seconds_left), (0.0, None));
        pass.advance(250, Duration::from_secs(5));
        assert_eq!((pass.rows_per_s, pass.seconds_left), (50.0, Some(15)));
        pass.advance(1200, Duration::from_secs(24));
        assert_eq!((pass.rows_total, pass.seconds_left), (1200, Some(0)), "there were more than estimated");
    }
}
