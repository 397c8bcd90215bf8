//! Where changes come from: a stream of them, and ordinary connections that ask.
//!
//! The stream is a replication connection, or the outbox that triggers write to. All connections are opened by `connect`
//! from one [`conninfo::ConnInfo`], so hosts, TLS and fall-backs behave the same.
//!
//! **Architecture invariant:** both streams speak pgoutput, so nothing behind them knows which it is.

use tokio_postgres::Client;

use crate::config::{self, PostgresConfig};
use crate::error::Result;
use crate::model::{Lsn, Snapshot};

use conninfo::ConnInfo;
use outbox::{Drain, Outbox};
use replication::{Replication, SystemIdentity, Walsender};
use slot::SlotState;

pub mod client;
pub mod conninfo;
pub mod outbox;
pub mod provision;
pub mod replication;
pub mod slot;

mod connect;
mod login;
mod server_error;
mod tls;
mod wire;

pub use server_error::query_error;

/// What is known of a stream before it begins.
#[derive(Clone, Debug)]
pub enum Standing {
    /// A slot, and where whoever made it noted that it was made.
    Slot(Option<SlotState>, Option<Lsn>),
    /// An outbox.
    Outbox(Option<outbox::State>),
}

impl Standing {
    /// Looks at the one that the rules file names.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::PostgresAway`] when the connection breaks.
    pub async fn look(client: &Client, config: &PostgresConfig) -> Result<Self> {
        Ok(match config.source {
            config::Source::Replication => Standing::Slot(
                slot::slot_state(client, &config.slot).await?,
                slot::birth_note(client, &config.publication, &config.slot).await?,
            ),
            config::Source::Outbox(_) => Standing::Outbox(outbox::state(client, &config.slot).await?),
        })
    }

    /// As a slot; `gap` is the mark up to which nothing is missing from an outbox.
    pub fn slot(&self, name: &str, gap: Option<i64>) -> Option<SlotState> {
        match self {
            Standing::Slot(slot, _) => slot.clone(),
            Standing::Outbox(state) => state.as_ref().map(|state| state.as_slot(name, gap)),
        }
    }

    /// Where the server's log ends.
    pub fn server_end(&self) -> Option<Lsn> {
        match self {
            Standing::Slot(slot, _) => {
                let slot = slot.as_ref()?;
                Some(Lsn(slot.restart_lsn?.0.saturating_add(slot.retained_bytes?)))
            }
            Standing::Outbox(state) => state.as_ref().map(|state| state.flushed),
        }
    }

    /// Where it was made.
    pub fn born_at(&self) -> Option<Lsn> {
        match self {
            Standing::Slot(_, born_at) => *born_at,
            Standing::Outbox(state) => state.as_ref().map(|state| state.made),
        }
    }

    /// What an outbox is marked with now.
    pub fn gap(&self) -> Option<i64> {
        match self {
            Standing::Slot(..) => None,
            Standing::Outbox(state) => state.as_ref().map(|state| state.gap),
        }
    }
}

/// A stream that does not stream yet.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
pub enum Ready {
    /// A replication connection.
    Replication(Walsender),
    /// What an outbox is read with.
    Outbox(outbox::Setting),
}

impl Ready {
    /// Connects as the rules file says, and says where that leads.
    ///
    /// # Errors
    /// As [`Walsender::connect`].
    pub async fn connect(config: &PostgresConfig, info: &ConnInfo, client: &Client) -> Result<(Self, SystemIdentity)> {
        match config.source {
            config::Source::Replication => {
                let mut walsender = Walsender::connect(info).await?;
                let identity = walsender.identify_system().await?;
                Ok((Ready::Replication(walsender), identity))
            }
            config::Source::Outbox(config::Outbox { poll_interval, notify, .. }) => {
                let (postgres, schema) = (info.clone(), config.slot.clone());
                let identity = outbox::identify_system(client).await?;
                Ok((Ready::Outbox(outbox::Setting { postgres, schema, poll_interval, notify }), identity))
            }
        }
    }

    /// Streams from `from` on; `drains` are those that the checkpoint knows.
    ///
    /// # Errors
    /// As [`Walsender::start`] and [`Outbox::start`].
    pub async fn start(self, config: &PostgresConfig, drains: &[Drain], from: Lsn) -> Result<Source> {
        Ok(match self {
            Ready::Replication(walsender) => {
                Source::Replication(walsender.start(&config.slot, &config.publication, from).await?)
            }
            Ready::Outbox(setting) => Source::Outbox(Outbox::start(setting, drains, from).await?),
        })
    }

    /// Streams from now on, for looking without touching.
    ///
    /// # Errors
    /// As [`Ready::start`].
    pub async fn start_temporary(self, config: &PostgresConfig) -> Result<Source> {
        Ok(match self {
            Ready::Replication(walsender) => Source::Replication(walsender.start_temporary(&config.publication).await?),
            Ready::Outbox(setting) => Source::Outbox(Outbox::watch(setting).await?),
        })
    }
}

/// What streams.
#[derive(Debug)]
pub enum Source {
    /// A slot, over a replication connection.
    Replication(Replication),
    /// The rows that triggers wrote.
    Outbox(Outbox),
}

/// What comes while streaming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// XLogData: one message of pgoutput.
    Data {
        /// Where in the log the change stands; 0/0 for messages that stand nowhere.
        wal_start: Lsn,
        /// The end of the log as the server knew it.
        wal_end: Lsn,
        /// The message.
        body: &'a [u8],
    },
    /// Primary keepalive message.
    Keepalive {
        /// Up to here everything that concerns this slot has been sent.
        wal_end: Lsn,
        /// The server gives up on this connection unless it hears a status update soon.
        reply_requested: bool,
    },
    /// Everything up to the next of these was visible to this snapshot.
    Visible(&'a Snapshot),
}

impl Source {
    /// Waits until more has arrived, once [`Source::next_buffered`] has nothing more to give. Cancel-safe.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::PostgresAway`] when the connection ends or breaks.
    pub async fn fill(&mut self) -> Result<()> {
        match self {
            Source::Replication(replication) => replication.fill().await,
            Source::Outbox(outbox) => outbox.fill().await,
        }
    }

    /// The next frame that has arrived whole. Does no I/O.
    ///
    /// # Errors
    /// As [`replication::Replication::next_buffered`].
    pub fn next_buffered(&mut self) -> Result<Option<Frame<'_>>> {
        match self {
            Source::Replication(replication) => replication.next_buffered(),
            Source::Outbox(outbox) => Ok(outbox.next_buffered()),
        }
    }

    /// Everything before `flushed` may be forgotten; the source says where it is if `reply_requested`. Never waits.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::PostgresAway`] when the connection breaks.
    pub async fn send_status(&mut self, flushed: Lsn, reply_requested: bool) -> Result<()> {
        match self {
            Source::Replication(replication) => replication.send_status(flushed, reply_requested).await,
            Source::Outbox(outbox) => {
                outbox.acknowledge(flushed);
                Ok(())
            }
        }
    }

    /// What has to be known to read again what lies behind `low`, which nothing before will be asked for again. Of what is
    /// `done` a replay only asks what is still owed.
    pub fn drains(&mut self, low: Lsn, done: Lsn) -> Vec<Drain> {
        match self {
            Source::Replication(_) => Vec::new(),
            Source::Outbox(outbox) => outbox.drains(low, done),
        }
    }

    /// Acknowledges `flushed` and ends the stream, so that somebody else may begin when this returns.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::PostgresAway`] when the connection breaks before, or the server does not end it in time.
    pub async fn close(&mut self, flushed: Lsn) -> Result<()> {
        match self {
            Source::Replication(replication) => replication.close(flushed).await,
            Source::Outbox(outbox) => outbox.close(flushed).await,
        }
    }
}
