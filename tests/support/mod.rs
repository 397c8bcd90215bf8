//! The harness: a [`Stage`] of private servers, the real daemon upon it, the oracle, and faults.
//!
//! Nothing here sleeps for a fixed time: whoever needs a state waits for it with [`wait_for`].

mod daemon;
mod oracle;
mod proxy;
mod reader;
mod stage;

use std::time::{Duration, Instant};

pub(crate) use daemon::Daemon;
pub(crate) use oracle::{Mirror, assert_in_step, differences};
pub(crate) use proxy::Proxy;
pub(crate) use reader::Reader;
pub(crate) use stage::Stage;

/// How long anything that must happen may take, on a busy machine with two cores.
const LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked at.
const POLL: Duration = Duration::from_millis(10);

/// Asks until there is an answer; `what` names it in the panic when there is none in time.
pub(crate) async fn wait_for<T>(what: &str, mut answer: impl AsyncFnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = answer().await {
            return answer;
        }
        assert!(began.elapsed() < LIMIT, "waited {LIMIT:?} in vain for: {what}");
        tokio::time::sleep(POLL).await;
    }
}
