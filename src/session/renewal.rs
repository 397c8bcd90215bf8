//! A slot that was lost is made anew. This waits for every transaction under way on the server, however long they take.
//!
//! An outbox that misses something is emptied, and waits for nothing: whoever was at work then is waited for before a table
//! is read.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use tokio_postgres::Client;

use crate::config::Source;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Lsn;
use crate::source::conninfo::ConnInfo;
use crate::source::outbox::Drain;
use crate::source::provision::{Wanted, oldest_transaction, renew_slot};
use crate::source::slot::{SlotState, slot_state};
use crate::source::{client, outbox};

use super::Daemon;

/// How long one try may take; then the next one begins.
const RENEWAL_LIMIT: Duration = Duration::from_secs(600);
/// How often the log says what is waited for.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// Makes what stands in for `old` and gives its confirmed position, and what an outbox goes on from. `client` answers
/// meanwhile.
pub(super) async fn renew(
    daemon: &Daemon,
    info: &ConnInfo,
    client: &Client,
    old: Option<&SlotState>,
) -> Result<(Lsn, Vec<Drain>)> {
    let config = &daemon.config.postgres;
    match (config.source, old) {
        (Source::Replication, old) => {
            let failover = old.is_some_and(|slot| slot.failover);
            Ok((renew_replication(daemon, info, client, failover).await?, Vec::new()))
        }
        (Source::Outbox(_), Some(_)) => {
            let drain = outbox::renew(client, &config.slot).await?;
            Ok((drain.lsn, vec![drain]))
        }
        (Source::Outbox(_), None) => {
            let gone = format!("there is no outbox in schema `{}` any more", config.slot);
            Err(Error::new(ErrorKind::Config, gone).hint("`keepstep setup` makes it"))
        }
    }
}

async fn renew_replication(daemon: &Daemon, info: &ConnInfo, client: &Client, failover: bool) -> Result<Lsn> {
    let (slot, publication) = (daemon.config.postgres.slot.clone(), daemon.config.postgres.publication.clone());
    let wanted = Wanted { slot, publication, tables: Vec::new(), optional: BTreeSet::new(), failover };
    let waiting = client::connect(info, RENEWAL_LIMIT).await?;
    let mut renewal = pin!(renew_slot(&waiting, &wanted));
    let mut say = tokio::time::interval_at(tokio::time::Instant::now() + SAID_EVERY, SAID_EVERY);
    loop {
        tokio::select! {
            made = &mut renewal => break made?,
            _ = say.tick() => {
                daemon.shared.alive();
                if let Some((pid, seconds)) = oldest_transaction(client).await {
                    tracing::warn!(pid, seconds, "making the slot waits for the transactions under way; this is the oldest");
                }
            }
        }
    }
    let confirmed = slot_state(client, &wanted.slot).await?.and_then(|slot| slot.confirmed_flush_lsn);
    confirmed.ok_or_else(|| {
        Error::new(ErrorKind::Fenced, format!("slot `{}` was made, and somebody else has it now", wanted.slot))
    })
}
