//! The stream of one slot: START_REPLICATION, frames in, status updates out.
//!
//! Protocol version 1 of pgoutput, without streaming of transactions in progress and without two-phase: what arrives is
//! committed (the manual's "Streaming Replication Protocol", "Logical Streaming Replication Parameters").

use std::time::{Duration, SystemTime};

pub use super::Frame;
use super::connect;
use super::conninfo::ConnInfo;
use super::login::ReplicationStartup;
use super::server_error::{NOT_IN_PREREQUISITE_STATE, OBJECT_IN_USE, ServerError, UNDEFINED_OBJECT};
use super::wire::{Wire, protocol};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Lsn;

/// How long [`Replication::close`] waits for the server.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// 2000-01-01 in seconds since 1970-01-01.
const POSTGRES_EPOCH_UNIX_S: u64 = 946_684_800;

/// Who the server is: the answer to IDENTIFY_SYSTEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SystemIdentity {
    /// The cluster's system identifier. The same on all its standbys and on copies of its files.
    pub system: String,
    /// The timeline, which changes at each promotion.
    pub timeline: u32,
    /// Up to where its log is flushed; nothing beyond exists for a logical slot.
    pub flush_lsn: Lsn,
    /// The database that this connection is to.
    pub database: String,
}

/// A replication connection that does not stream yet.
#[derive(Debug)]
pub struct Walsender {
    wire: Wire,
}

impl Walsender {
    /// Connects with `replication=database`.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] if no host can be reached, [`ErrorKind::PostgresDenied`] if one refuses.
    pub async fn connect(info: &ConnInfo) -> Result<Self> {
        Ok(Walsender { wire: connect::open(info, &ReplicationStartup).await?.wire })
    }

    /// IDENTIFY_SYSTEM.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] when the connection breaks.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity> {
        let rows = self.wire.query("cannot identify the Postgres server", "IDENTIFY_SYSTEM").await?;
        let mut columns = rows.into_iter().next().unwrap_or_default().into_iter().map(Option::unwrap_or_default);
        let mut column = || columns.next().unwrap_or_default();
        let (system, timeline, lsn, database) = (column(), column(), column(), column());
        let malformed = || protocol("IDENTIFY_SYSTEM without a timeline or a log position");
        Ok(SystemIdentity {
            system,
            timeline: timeline.parse().map_err(|_| malformed())?,
            flush_lsn: lsn.parse().map_err(|_| malformed())?,
            database,
        })
    }

    /// Streams the slot from `from` on. Postgres silently begins at the slot's confirmed LSN if that is later:
    /// compare first.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] while another walsender holds the slot; [`ErrorKind::Gap`] if the slot does not
    /// exist or lost its log; [`ErrorKind::Identity`] if it belongs to another database or plugin;
    /// [`ErrorKind::PostgresDenied`] if the server does not do logical decoding.
    pub async fn start(mut self, slot: &str, publication: &str, from: Lsn) -> Result<Replication> {
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {from} ({})",
            quote_identifier(slot),
            plugin_options(publication)
        );
        match self.wire.copy_both(&command).await? {
            Ok(()) => Ok(Replication { wire: self.wire, received: from, reply_owed: false }),
            Err(refusal) => Err(self.explain(refusal, slot).await),
        }
    }

    /// Streams a temporary slot of its own from now on, for looking without touching: it goes away with the connection.
    ///
    /// # Errors
    /// As for [`Walsender::start`].
    pub async fn start_temporary(mut self, publication: &str) -> Result<Replication> {
        // The backend's pid: unique among live sessions, and temporary slots do not outlive theirs.
        let doing = "cannot make a temporary slot";
        let rows = self.wire.query(doing, "SELECT 'keepstep_temporary_' || pg_backend_pid()").await?;
        let slot = rows.into_iter().flatten().flatten().next().ok_or_else(|| protocol("no backend pid"))?;
        // The spelling before Postgres 15, which later ones still take.
        let command =
            format!("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT", quote_identifier(&slot));
        let rows = self.wire.query(doing, &command).await?;
        let consistent = rows.first().and_then(|row| row.get(1)?.as_deref()?.parse().ok());
        let consistent = consistent.ok_or_else(|| protocol("CREATE_REPLICATION_SLOT without a log position"))?;
        self.start(&slot, publication, consistent).await
    }

    /// What a refused START_REPLICATION means. The SQLSTATE alone says too little (55000 is a lost slot, another
    /// database and `wal_level` alike), so the slot is looked at.
    async fn explain(&mut self, refusal: ServerError, slot: &str) -> Error {
        let doing = format!("cannot stream slot `{slot}`");
        match refusal.sqlstate.as_str() {
            OBJECT_IN_USE => {
                refusal.into_error(&doing).hint("another daemon, or one that just ended, still streams it")
            }
            UNDEFINED_OBJECT => Error::new(ErrorKind::Gap, format!("{doing}: it does not exist"))
                .hint("it was dropped, or never made: `keepstep setup` makes it"),
            _ => {
                let sql = format!(
                    "SELECT slot_type, plugin, database, current_database(), coalesce(wal_status, '') \
                     FROM pg_replication_slots WHERE slot_name = {}",
                    quote_literal(slot)
                );
                match self.wire.query(&doing, &sql).await {
                    Ok(rows) => explain_state(&doing, refusal, rows.first().map(Vec::as_slice)),
                    Err(error) => error,
                }
            }
        }
    }
}

/// From slot_type, plugin, database, current_database(), wal_status.
fn explain_state(doing: &str, refusal: ServerError, row: Option<&[Option<String>]>) -> Error {
    let Some([kind, plugin, database, current, wal_status]) = row else {
        return Error::new(ErrorKind::Gap, format!("{doing}: it does not exist any more"));
    };
    let text = |column: &Option<String>| column.clone().unwrap_or_default();
    if text(kind) != "logical" {
        return Error::new(ErrorKind::Identity, format!("{doing}: it is a physical slot"));
    }
    if database != current {
        let (database, current) = (text(database), text(current));
        let message = format!("{doing}: it was made in database `{database}`, and the URL names `{current}`");
        return Error::new(ErrorKind::Identity, message);
    }
    if text(plugin) != "pgoutput" {
        let message = format!("{doing}: its output plugin is `{}`, not pgoutput", text(plugin));
        return Error::new(ErrorKind::Identity, message);
    }
    if text(wal_status) == "lost" {
        let message = format!("{doing}: Postgres removed log that it had not sent yet");
        return Error::new(ErrorKind::Gap, message).hint(
            "raise max_slot_wal_keep_size (18: idle_replication_slot_timeout) to let the daemon be away for longer",
        );
    }
    let wal_level = refusal.sqlstate == NOT_IN_PREREQUISITE_STATE;
    let error = refusal.into_error(doing);
    match wal_level {
        true => error.hint("logical decoding needs `wal_level = logical`, also on a standby's primary"),
        false => error,
    }
}

fn plugin_options(publication: &str) -> String {
    // The list of names is parsed by itself inside the literal (SplitIdentifierString).
    let names = quote_literal(&quote_identifier(publication));
    format!("proto_version '1', publication_names {names}, messages 'true'")
}

/// As the replication grammar reads it (`src/backend/replication/repl_scanner.l`).
fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A slot's stream. See [`Walsender::start`].
#[derive(Debug)]
pub struct Replication {
    wire: Wire,
    /// The furthest log position that the server has mentioned.
    received: Lsn,
    /// The server asked for a status update, and none has gone out since.
    reply_owed: bool,
}

impl Replication {
    /// Waits until more bytes have arrived, once [`Replication::next_buffered`] has nothing more to give. Cancel-safe.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] when the connection ends or breaks.
    pub async fn fill(&mut self) -> Result<()> {
        self.wire.fill().await
    }

    /// The next frame that has arrived whole. Does no I/O.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] when the server ends the stream, what it says instead by its kind, or
    /// [`ErrorKind::Protocol`] when it makes no sense.
    pub fn next_buffered(&mut self) -> Result<Option<Frame<'_>>> {
        let Some(payload) = self.wire.next_copy_data()? else { return Ok(None) };
        let frame = parse_frame(payload)?;
        match frame {
            Frame::Data { wal_start, wal_end, .. } => self.received = self.received.max(wal_start).max(wal_end),
            Frame::Keepalive { wal_end, reply_requested } => {
                self.received = self.received.max(wal_end);
                self.reply_owed |= reply_requested;
            }
            Frame::Visible(_) => {}
        }
        Ok(Some(frame))
    }

    /// Tells the server that everything before `flushed` may be forgotten (0/0 says nothing about it), and asks for
    /// an answer if `reply_requested`. Never waits: where the server takes nothing just now the update is left out,
    /// and the next one says as much.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] when the connection breaks.
    pub async fn send_status(&mut self, flushed: Lsn, reply_requested: bool) -> Result<()> {
        let now = SystemTime::now();
        let received = self.received.max(flushed);
        let mut sent = self.wire.send_if_room(&status(received, flushed, now, reply_requested)).await?;
        // A server that shuts down asks for replies until all it sent is flushed here, for ever if acknowledgements
        // trail. Where no flush position stands it is content with what was received (`WalSndDone` in
        // src/backend/replication/walsender.c), and without one the slot does not move.
        if self.reply_owed && flushed < received {
            sent &= self.wire.send_if_room(&status(received, Lsn(0), now, false)).await?;
        }
        self.reply_owed &= !sent;
        Ok(())
    }

    /// Acknowledges `flushed` and ends the session, so that the slot is free when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] when the connection breaks before, or the server does not end it in time.
    pub async fn close(&mut self, flushed: Lsn) -> Result<()> {
        self.send_status(flushed, false).await?;
        let ended = tokio::time::timeout(CLOSE_LIMIT, self.wire.close()).await;
        let ended = ended.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()));
        ended.map_err(|error| {
            Error::new(ErrorKind::PostgresAway, "the replication connection did not end").because(error)
        })
    }
}

fn parse_frame(payload: &[u8]) -> Result<Frame<'_>> {
    let parse = || {
        let (&tag, rest) = payload.split_first()?;
        let (first, rest) = rest.split_first_chunk::<8>()?;
        let (second, rest) = rest.split_first_chunk::<8>()?;
        let first = Lsn(u64::from_be_bytes(*first));
        match (tag, rest) {
            (b'w', rest) => {
                let (_sent_at, body) = rest.split_first_chunk::<8>()?;
                Some(Frame::Data { wal_start: first, wal_end: Lsn(u64::from_be_bytes(*second)), body })
            }
            (b'k', &[reply]) => Some(Frame::Keepalive { wal_end: first, reply_requested: reply != 0 }),
            _ => None,
        }
    };
    parse().ok_or_else(|| protocol("a replication message of unknown form"))
}

/// Standby status update.
fn status(written: Lsn, flushed: Lsn, now: SystemTime, reply_requested: bool) -> [u8; 34] {
    let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH_UNIX_S));
    let now_us = i64::try_from(since_epoch.unwrap_or_default().as_micros()).unwrap_or(i64::MAX);
    let mut message = [0; 34];
    message[0] = b'r';
    message[1..9].copy_from_slice(&written.0.to_be_bytes());
    message[9..17].copy_from_slice(&flushed.0.to_be_bytes());
    message[17..25].copy_from_slice(&flushed.0.to_be_bytes());
    message[25..33].copy_from_slice(&now_us.to_be_bytes());
    message[33] = u8::from(reply_requested);
    message
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frames_are_read() {
        let data = [&b"w"[..], &7_u64.to_be_bytes(), &8_u64.to_be_bytes(), &[0; 8], b"body"].concat();
        let frame = Frame::Data { wal_start: Lsn(7), wal_end: Lsn(8), body: b"body" };
        assert_eq!(parse_frame(&data).unwrap(), frame);
        let keepalive = [&b"k"[..], &9_u64.to_be_bytes(), &[0; 8], &[1]].concat();
        assert_eq!(parse_frame(&keepalive).unwrap(), Frame::Keepalive { wal_end: Lsn(9), reply_requested: true });
        for (frame, shortest) in [(data, 25), (keepalive, 18)] {
            for end in 0..shortest {
                assert_eq!(parse_frame(&frame[..end]).unwrap_err().kind(), ErrorKind::Protocol);
            }
        }
    }

    #[test]
    fn a_status_update_says_when_it_was_sent() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(POSTGRES_EPOCH_UNIX_S) + Duration::from_micros(5);
        let message = status(Lsn(2), Lsn(1), now, true);
        let expected = [&b"r"[..], &2_u64.to_be_bytes(), &1_u64.to_be_bytes(), &1_u64.to_be_bytes()].concat();
        assert_eq!(message[..25], expected);
        assert_eq!(message[25..], [0, 0, 0, 0, 0, 0, 0, 5, 1]);
    }

    #[test]
    fn names_cannot_leave_their_quotes() {
        assert_eq!(plugin_options("a\"b'c"), "proto_version '1', publication_names '\"a\"\"b''c\"', messages 'true'");
    }

    proptest! {
        #[test]
        fn any_payload_gives_an_answer(payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse_frame(&payload);
        }
    }
}
