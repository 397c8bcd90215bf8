//! A slot made anew by the daemon itself, because the one before was lost.
//!
//! Of two daemons that find it lost only one makes it: the drop looks at the state once more, and whoever comes second
//! begins again and finds the slot in use.

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::facts;
use super::{Statement, Wanted, create_slot, identifier, literal, make_slot};
use crate::error::{Error, ErrorKind, Result};
use crate::source::query_error;

/// Makes the slot. One of the same name that the server gave up is dropped before; `failover` of [`Wanted`] counts, its
/// tables do not. Waits for every transaction under way; as long as `client` waits at all.
///
/// # Errors
/// [`ErrorKind::Config`] without the publication, [`ErrorKind::Fenced`] if another daemon does the same, and what
/// Postgres says.
pub async fn renew_slot(client: &Client, wanted: &Wanted) -> Result<()> {
    let facts = facts::read(client, wanted).await?;
    let Some(publication) = facts.publication else {
        let message = format!("publication `{}` does not exist, so no slot can be made for it", wanted.publication);
        return Err(Error::new(ErrorKind::Config, message).hint("`keepstep setup` makes both"));
    };
    if facts.slot.is_some_and(|slot| slot.is_lost()) {
        carry_out(client, &drop_lost(&wanted.slot)).await?;
    }
    if !publication.owned {
        tracing::warn!(
            "the role does not own publication {}: where the new slot was made cannot be noted there, so \
             `keepstep teardown` will leave the slot alone",
            identifier(&wanted.publication)
        );
    }
    carry_out(client, &if publication.owned { make_slot(wanted) } else { make_without_note(wanted) }).await
}

/// Only what is lost at that very moment: another daemon may have made it anew.
fn drop_lost(slot: &str) -> Statement {
    let sql = format!(
        "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {} AND wal_status = 'lost';",
        literal(slot)
    );
    Statement { purpose: format!("drop the lost slot `{slot}`"), sql }
}

fn make_without_note(wanted: &Wanted) -> Statement {
    Statement { purpose: format!("make slot `{}`", wanted.slot), sql: format!("SELECT {};", create_slot(wanted)) }
}

async fn carry_out(client: &Client, Statement { purpose, sql }: &Statement) -> Result<()> {
    tracing::info!("{purpose}");
    let Err(error) = client.batch_execute(sql).await else { return Ok(()) };
    let raced = [SqlState::DUPLICATE_OBJECT, SqlState::UNDEFINED_OBJECT];
    if error.code().is_some_and(|code| raced.contains(code)) {
        return Err(Error::new(ErrorKind::Fenced, format!("cannot {purpose}: another daemon is at work on it")));
    }
    Err(query_error(&format!("cannot {purpose}"), error))
}
