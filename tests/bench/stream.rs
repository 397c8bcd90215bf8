//! Streams of row changes as pgoutput sends them, made in memory, and the daemon's own way for them: no server.
//!
//! A [`Shape`] says what the tables, the rules and the changes look like; a [`Stream`] is its frames; a [`Replay`] takes
//! them through decoding, planning and the encoding of commands, as the session does. Everything stands in memory
//! before the first frame is taken, so nothing but that way is measured.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

use keepstep::batch::{Batch, Limits};
use keepstep::cache::checkpoint::{Checkpoint, Origin, RuleSet};
use keepstep::cache::commands;
use keepstep::config::{self, Config, RulesFile};
use keepstep::decode::pgoutput;
use keepstep::decode::types::Types;
use keepstep::metrics::Metrics;
use keepstep::model::{Lsn, Position, Relation};
use keepstep::plan::BoundTable;
use keepstep::rules::bind::bind;
use keepstep::session::intake::{Ask, Intake};
use keepstep::snapshot::visibility::Snapshot;
use tokio_postgres::types::Type;

/// What text columns hold, again and again: nothing that JSON must escape.
const WORDS: &str = "Keeps Redis in step with Postgres. ";
/// A commit time and an LSN; which ones does not matter.
const SOME_TIME: u64 = 800_000_000_000_000;
const SOME_LSN: u64 = 0x16_B374_D848;

/// Tables that are all alike, their rules, and the changes of their rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// What each change is.
    pub(crate) operation: Operation,
    /// What each rule does.
    pub(crate) action: Action,
    /// `bigint` columns; the first is the primary key and the row's number.
    pub(crate) integers: usize,
    /// `text` columns behind them.
    pub(crate) texts: usize,
    /// The length of each text.
    pub(crate) text_bytes: usize,
    /// Tables, which take turns.
    pub(crate) tables: usize,
    /// Rules on each table.
    pub(crate) rules: usize,
    /// Changes in the stream.
    pub(crate) changes: usize,
    /// Changes in one transaction.
    pub(crate) transaction: usize,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation {
    Insert,
    /// Of columns that are not in the key: no old tuple.
    Update,
    Delete,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// The whole row as JSON.
    Json,
    /// A key that goes.
    Delete,
    /// The rules take turns: JSON on a condition, a hash, a member of a set, one of a sorted set, a key that goes.
    Mixed,
}

/// Rows of 40 bytes, a thousand in a transaction.
pub(crate) const NARROW: Shape = Shape {
    operation: Operation::Insert,
    action: Action::Json,
    integers: 2,
    texts: 1,
    text_bytes: 24,
    tables: 1,
    rules: 1,
    changes: 1000,
    transaction: 1000,
};

/// What pgbench does to its accounts: aid, bid, abalance and 84 bytes of filler, a transaction for each row.
pub(crate) const PGBENCH: Shape =
    Shape { operation: Operation::Update, integers: 3, text_bytes: 84, transaction: 1, ..NARROW };

/// Rows of 1 KB.
pub(crate) const WIDE: Shape = Shape { texts: 4, text_bytes: 250, ..NARROW };

/// The frames of a stream, and the rules for its tables.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    rules: String,
    relations: Vec<Vec<u8>>,
    /// Begin, the changes, Commit, and so on.
    frames: Vec<Vec<u8>>,
}

impl Stream {
    pub(crate) fn new(shape: Shape) -> Self {
        let mut frames = Vec::new();
        for row in 0..shape.changes {
            if row % shape.transaction == 0 {
                frames.push(begin());
            }
            frames.push(change(shape, row));
            if (row + 1) % shape.transaction == 0 || row + 1 == shape.changes {
                frames.push(commit());
            }
        }
        Stream {
            rules: rules(shape),
            relations: (0..shape.tables).map(|table| relation(shape, table)).collect(),
            frames,
        }
    }

    /// What a server has sent for these rules.
    pub(crate) fn captured(rules: String, frames: Vec<Vec<u8>>) -> Self {
        let (relations, frames) = frames.into_iter().partition(|frame| frame.first() == Some(&b'R'));
        Stream { rules, relations, frames }
    }

    /// Decodes every frame; gives how many there are.
    pub(crate) fn decode(&self) -> usize {
        for frame in &self.frames {
            std::hint::black_box(pgoutput::parse(std::hint::black_box(frame)).expect("a message"));
        }
        self.frames.len()
    }
}

fn rules(shape: Shape) -> String {
    let mut text = String::new();
    for table in 0..shape.tables {
        for rule in 0..shape.rules {
            let key = format!("t{table}:r{rule}:{{i0}}");
            let json = format!("key = \"{key}\"\nvalue = \"json\"\ncolumns = [\"*\"]");
            let delete = format!("delete = [\"{key}\"]");
            let action = match (shape.action, rule % 5) {
                (Action::Json, _) => json,
                (Action::Delete, _) | (Action::Mixed, 4) => delete,
                (Action::Mixed, 0) => format!("{json}\nwhen = \"row.i1 > 5 && row.t0 != 'x'\""),
                (Action::Mixed, 1) => format!("key = \"{key}\"\nvalue = \"hash\"\ncolumns = [\"*\"]"),
                (Action::Mixed, 2) => format!("key = \"{key}\"\nvalue = \"set\"\nmember = \"{{i0}}\""),
                (Action::Mixed, _) => {
                    format!("key = \"{key}\"\nvalue = \"zset\"\nmember = \"{{i0}}\"\nscore = \"row.i1\"")
                }
            };
            writeln!(text, "[rule.t{table}-r{rule}]\ntable = \"public.t{table}\"\n{action}")
                .expect("a String takes all");
        }
    }
    text
}

fn relation(shape: Shape, table: usize) -> Vec<u8> {
    let mut frame = vec![b'R'];
    frame.extend(oid(table));
    frame.extend(format!("public\0t{table}\0d").bytes());
    frame.extend(column_count(shape));
    let integers = (0..shape.integers).map(|number| (format!("i{number}"), Type::INT8));
    let texts = (0..shape.texts).map(|number| (format!("t{number}"), Type::TEXT));
    for (place, (name, ty)) in integers.chain(texts).enumerate() {
        frame.push(u8::from(place == 0));
        frame.extend(format!("{name}\0").bytes());
        frame.extend(ty.oid().to_be_bytes());
        frame.extend((-1_i32).to_be_bytes());
    }
    frame
}

fn begin() -> Vec<u8> {
    [b"B".as_slice(), &SOME_LSN.to_be_bytes(), &SOME_TIME.to_be_bytes(), &740_u32.to_be_bytes()].concat()
}

fn commit() -> Vec<u8> {
    let lsn = SOME_LSN.to_be_bytes();
    [b"C\0".as_slice(), &lsn, &(SOME_LSN + 1).to_be_bytes(), &SOME_TIME.to_be_bytes()].concat()
}

fn change(shape: Shape, row: usize) -> Vec<u8> {
    let (kind, tuple_kind) = match shape.operation {
        Operation::Insert => (b'I', b'N'),
        Operation::Update => (b'U', b'N'),
        Operation::Delete => (b'D', b'K'),
    };
    let mut frame = vec![kind];
    frame.extend(oid(row % shape.tables));
    frame.push(tuple_kind);
    frame.extend(column_count(shape));
    push_text(&mut frame, &(1_000_000 + row).to_string());
    let text: String = WORDS.chars().cycle().take(shape.text_bytes).collect();
    for place in 1..shape.integers + shape.texts {
        match shape.operation {
            // An old tuple holds the primary key alone.
            Operation::Delete => frame.push(b'n'),
            _ if place < shape.integers => push_text(&mut frame, &(10_000_000 + row).to_string()),
            _ => push_text(&mut frame, &text),
        }
    }
    frame
}

fn push_text(frame: &mut Vec<u8>, text: &str) {
    frame.push(b't');
    frame.extend((text.len() as u32).to_be_bytes());
    frame.extend(text.bytes());
}

fn oid(table: usize) -> [u8; 4] {
    (16_384 + table as u32).to_be_bytes()
}

fn column_count(shape: Shape) -> [u8; 2] {
    ((shape.integers + shape.texts) as u16).to_be_bytes()
}

/// Takes frames as the session does, as many as one likes.
pub(crate) struct Replay {
    config: Config,
    types: Types,
    intake: Intake,
    batch: Batch,
    /// Sees every transaction of the stream.
    later: Snapshot,
}

impl Replay {
    /// At the beginning of the stream: its tables are bound as its Relation messages describe them.
    pub(crate) fn new(stream: &Stream) -> Self {
        let mut replay = Self::of_rules(&stream.rules);
        for frame in &stream.relations {
            replay.take(frame);
        }
        replay
    }

    /// Before any stream.
    pub(crate) fn of_rules(rules: &str) -> Self {
        let config = config(rules);
        let rules = Arc::new(RuleSet::new(&config.rules));
        let intake = Intake::new(&checkpoint(&rules), rules, Arc::new(Metrics::new()));
        let limits = Limits { ops: config.redis.batch_ops, bytes: config.redis.batch_bytes };
        let batch = Batch::new(limits, config.rules.len());
        let later = "1000000:1000000:".parse().expect("a snapshot");
        Replay { config, types: Types::builtin(), intake, batch, later }
    }

    /// Decodes one frame and plans its change.
    pub(crate) fn take(&mut self, frame: &[u8]) {
        let event = pgoutput::parse(frame).expect("a frame");
        if let Some(Ask::Bind(relation)) = self.intake.take(event, &mut self.batch).expect("an event") {
            self.intake.bind(bound(&self.config, &self.types, relation));
        }
    }

    /// If the batch is full: encodes its commands, and empties it.
    pub(crate) fn send_if_full(&mut self) -> usize {
        if !self.batch.is_full() {
            return 0;
        }
        let sent_bytes = self.encode();
        self.batch.clear();
        sent_bytes
    }

    /// Decodes the stream and plans its changes; gives the bytes of keys and values.
    pub(crate) fn plan(&mut self, stream: &Stream) -> usize {
        self.replay(stream, |replay| replay.batch.byte_len())
    }

    /// Decodes the stream, plans its changes and encodes the commands; gives the bytes that would be sent.
    pub(crate) fn run(&mut self, stream: &Stream) -> usize {
        self.replay(stream, |replay| replay.encode())
    }

    /// The commands of the last batch; gives the bytes that would be sent.
    pub(crate) fn encode(&mut self) -> usize {
        commands::encode(&self.batch, &self.config.redis, |_| true)
            .iter()
            .map(|command| command.get_packed_command().len())
            .sum()
    }

    fn replay(&mut self, stream: &Stream, mut send: impl FnMut(&mut Self) -> usize) -> usize {
        self.batch.clear();
        let mut sent_bytes = 0;
        for frame in &stream.frames {
            self.take(frame);
            if self.batch.is_full() {
                sent_bytes += send(self);
                self.intake.settle(self.later.clone());
                self.batch.clear();
            }
        }
        self.intake.settle(self.later.clone());
        sent_bytes + send(self)
    }
}

/// A rules file of these rules.
pub(crate) fn config(rules: &str) -> Config {
    let servers = "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\nprefix = \"bench:\"\n";
    let file = RulesFile { path: "bench.toml".into(), text: format!("{servers}{rules}") };
    config::parse(file, &|_| None).expect("a rules file").0
}

/// Of a cache that holds nothing yet.
pub(crate) fn checkpoint(rules: &RuleSet) -> Checkpoint {
    let origin = Origin { system: "7".into(), timeline: 1, database: "bench".into(), slot: "keepstep".into() };
    Checkpoint {
        version: Checkpoint::VERSION,
        origin,
        epoch: 0,
        applied: Position::default(),
        low: Lsn::default(),
        good: Position::default(),
        rules: rules.digest.clone(),
        written_us: 0,
        owing: BTreeMap::new(),
        released: Position::default(),
        progress: None,
        drains: Vec::new(),
        gap: None,
    }
}

fn bound(config: &Config, types: &Types, relation: Relation) -> BoundTable {
    let prefix = &config.redis.prefix;
    let of_table = (0..).zip(&config.rules).filter(|(_, rule)| rule.table.value.name == relation.name);
    let rules =
        of_table.map(|(number, rule)| bind(rule, number, &relation, None, types, prefix).expect("a rule that fits"));
    BoundTable { rules: rules.collect(), relation }
}
