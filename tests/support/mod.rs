//! The harness: a [`Stage`] of private servers, the real daemon upon it, the oracle, and faults.
//!
//! Nothing here sleeps for a fixed time: whoever needs a state waits for it with [`wait_for`].

mod daemon;
mod json;
mod load;
mod oracle;
mod proxy;
mod reader;
mod replica;
mod sentinels;
mod stage;
mod standby;

use std::process::Command;
use std::time::{Duration, Instant};

pub(crate) use daemon::Daemon;
pub(crate) use json::JsonRedis;
pub(crate) use load::{Load, ROWS, RULES};
pub(crate) use oracle::{Mirror, assert_in_step, differences};
pub(crate) use proxy::Proxy;
pub(crate) use reader::Reader;
pub(crate) use replica::Replica;
pub(crate) use sentinels::Sentinels;
pub(crate) use stage::{Stage, reads_outbox};
pub(crate) use standby::{Stalled, Standby};

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

/// Whether the state comes to be within `limit`: for what a wrong variant does and the right one does not.
pub(crate) async fn comes_within(limit: Duration, mut state: impl AsyncFnMut() -> bool) -> bool {
    let began = Instant::now();
    while began.elapsed() < limit {
        if state().await {
            return true;
        }
        tokio::time::sleep(POLL).await;
    }
    false
}

/// Waits for a moment: how long a fault lasts, when the next one comes.
pub(crate) async fn lasts(time: Duration) {
    comes_within(time, async || false).await;
}

/// Sends a signal to a process.
pub(crate) fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().unwrap().success());
}
