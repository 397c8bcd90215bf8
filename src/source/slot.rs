//! What Postgres says about the slot, and the note of where it was made.
//!
//! **Birth note.** A slot that stands past the cache's checkpoint is a gap; but a cache without any checkpoint has
//! nothing to compare with. So whoever makes the slot writes down, in the comment of the publication, where it was
//! made: a slot that still stands there has lost nothing, one that moved on without a checkpoint has.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::query_error;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Lsn;

/// The prefix of every logical message that keepstep emits.
pub const MESSAGE_PREFIX: &str = "keepstep";

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotState {
    /// Its name.
    pub name: String,
    /// The output plugin; `None` for a physical slot.
    pub plugin: Option<String>,
    /// The database it was made in; `None` for a physical slot.
    pub database: Option<String>,
    /// The walsender that streams it now.
    pub active_pid: Option<i32>,
    /// The oldest log that it keeps.
    pub restart_lsn: Option<Lsn>,
    /// Up to where changes were acknowledged; START_REPLICATION goes on there.
    pub confirmed_flush_lsn: Option<Lsn>,
    /// Whether the log that it needs is still there.
    pub wal_status: Option<WalStatus>,
    /// How many bytes of log may still be written before it is in danger; `None` is no limit.
    pub safe_wal_size: Option<i64>,
    /// How many bytes of log it keeps.
    pub retained_bytes: Option<u64>,
    /// Why it can no longer be used (Postgres 17 and later).
    pub invalidation_reason: Option<String>,
    /// Whether it is kept on standbys too (Postgres 17 and later).
    pub failover: bool,
}

/// `pg_replication_slots.wal_status`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalStatus {
    /// Within `max_wal_size`.
    Reserved,
    /// Beyond it, and kept.
    Extended,
    /// To be removed at the next checkpoint.
    Unreserved,
    /// Removed: the slot is of no use any more.
    Lost,
}

impl WalStatus {
    const ALL: [WalStatus; 4] = [Self::Reserved, Self::Extended, Self::Unreserved, Self::Lost];

    /// As Postgres writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Extended => "extended",
            Self::Unreserved => "unreserved",
            Self::Lost => "lost",
        }
    }
}

impl SlotState {
    /// Whether it can never be streamed again.
    pub fn is_lost(&self) -> bool {
        self.wal_status == Some(WalStatus::Lost) || self.invalidation_reason.is_some()
    }
}

/// Asks for the state of a slot; `None` if there is no such slot.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn slot_state(client: &Client, name: &str) -> Result<Option<SlotState>> {
    let doing = "cannot read the slot's state";
    // Through jsonb: `invalidation_reason` and `failover` are columns from Postgres 17 on.
    let sql = "select slot_name::text, plugin::text, database::text, active_pid, restart_lsn::text,
          confirmed_flush_lsn::text, wal_status, safe_wal_size,
          pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end,
                          restart_lsn)::int8,
          to_jsonb(slot) ->> 'invalidation_reason', coalesce((to_jsonb(slot) ->> 'failover')::bool, false)
        from pg_replication_slots slot where slot_name = $1::text";
    let row = client.query_typed_opt(sql, &[(&name, Type::TEXT)]).await.map_err(|error| query_error(doing, error))?;
    row.map(|row| read_slot(&row, doing)).transpose()
}

fn read_slot(row: &Row, doing: &str) -> Result<SlotState> {
    let wal_status = get::<Option<String>>(row, 6, doing)?;
    Ok(SlotState {
        name: get(row, 0, doing)?,
        plugin: get(row, 1, doing)?,
        database: get(row, 2, doing)?,
        active_pid: get(row, 3, doing)?,
        restart_lsn: lsn(row, 4, doing)?,
        confirmed_flush_lsn: lsn(row, 5, doing)?,
        wal_status: wal_status.and_then(|name| WalStatus::ALL.into_iter().find(|status| status.name() == name)),
        safe_wal_size: get(row, 7, doing)?,
        retained_bytes: get::<Option<i64>>(row, 8, doing)?.map(|bytes| u64::try_from(bytes).unwrap_or(0)),
        invalidation_reason: get(row, 9, doing)?,
        failover: get(row, 10, doing)?,
    })
}

fn get<'a, T: tokio_postgres::types::FromSql<'a>>(row: &'a Row, column: usize, doing: &str) -> Result<T> {
    row.try_get(column).map_err(|error| query_error(doing, error))
}

fn lsn(row: &Row, column: usize, doing: &str) -> Result<Option<Lsn>> {
    let text = get::<Option<&str>>(row, column, doing)?;
    text.map(|text| text.parse().map_err(|error| Error::new(ErrorKind::Protocol, doing).because(error))).transpose()
}

/// Drops a slot that keeps more than so many bytes of log and that nobody streams; whether it did. Somebody else's slot stays.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn give_up(client: &Client, name: &str, max_retained: u64) -> Result<bool> {
    let sql = "select pg_drop_replication_slot(slot_name)::text from pg_replication_slots
        where slot_name = $1::text and not active and plugin = 'pgoutput' and database = current_database()
          and pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn) > $2::int8";
    let most = i64::try_from(max_retained).unwrap_or(i64::MAX);
    let dropped = client.query_typed(sql, &[(&name, Type::TEXT), (&most, Type::INT8)]).await;
    dropped.map(|rows| !rows.is_empty()).map_err(|error| query_error("cannot drop the slot", error))
}

/// Where the slot was made, if whoever made it left a note in the publication's comment.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn birth_note(client: &Client, publication: &str, slot: &str) -> Result<Option<Lsn>> {
    let doing = "cannot read the publication's comment";
    let sql = "select obj_description(oid, 'pg_publication') from pg_publication where pubname = $1::text";
    let row = client.query_typed_opt(sql, &[(&publication, Type::TEXT)]).await;
    let Some(row) = row.map_err(|error| query_error(doing, error))? else { return Ok(None) };
    let comment = get::<Option<&str>>(&row, 0, doing)?.unwrap_or_default();
    Ok(comment.lines().find_map(|line| note_of_slot(line, slot)))
}

/// What every birth note begins with.
pub(super) const BIRTH_NOTE: &str = "keepstep: slot ";

/// What the birth note of this slot begins with; its log position follows.
pub(super) fn birth_note_of(slot: &str) -> String {
    format!("{BIRTH_NOTE}{slot} made at ")
}

fn note_of_slot(line: &str, slot: &str) -> Option<Lsn> {
    line.strip_prefix(&birth_note_of(slot))?.trim().parse().ok()
}

/// Writes a logical message, so that the slot can move although nothing it follows is written to.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn heartbeat(client: &Client) -> Result<()> {
    let sql = "select pg_logical_emit_message(false, $1::text, 'heartbeat')";
    let sent = client.query_typed(sql, &[(&MESSAGE_PREFIX, Type::TEXT)]).await;
    sent.map(drop).map_err(|error| query_error("cannot write a heartbeat message", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_birth_note_is_of_one_slot() {
        assert_eq!(note_of_slot("keepstep: slot a made at 0/15D4F28", "a"), Some(Lsn(0x15D_4F28)));
        for line in ["keepstep: slot ab made at 0/1", "keepstep: slot a made at", "slot a made at 0/1", ""] {
            assert_eq!(note_of_slot(line, "a"), None, "{line}");
        }
    }
}
