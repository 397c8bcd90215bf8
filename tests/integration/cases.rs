//! What a change becomes, one case a line: rules, a change, the Redis commands. Needs no server.
//!
//! The cases stand in `cases/*.cases`. A group begins with `== what it is about`, and goes on with a header:
//!
//! - `table id:int4* name:text`: the columns, those with `*` in the primary key, or in the index of the replica identity;
//! - `identity default full` (default `default`): the expectations hold under each of these;
//! - `prefix v2: v1:`: `[redis] prefix`, and behind it `also_prefix`;
//! - the rules, indented; what stands before the first `[rule.NAME]` is the rule `r`. Each is about the table.
//!
//! A case is `change | commands`, or several changes of one batch with ` & ` between them:
//!
//! - `insert NEW`, `update OLD -> NEW`, `delete OLD`, `truncate`, `gap`, and `read ROW` for a row that a pass reads;
//! - a row is a word for each column, in single quotes where it holds spaces; `-` is NULL, `~` what the log leaves out of a
//!   new row because it is TOASTed and did not change;
//! - OLD is always given whole. What the replica identity leaves of it is left of it here too: all of it under `full`; else
//!   the columns with `*`, and on UPDATE nothing at all unless one of them changed.
//!
//! Commands are separated by `; `. Behind `>>` stands what waits until the transaction is visible, behind `>>>` what waits for
//! longer, behind `!` what was noted.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::time::Duration;

use keepstep::batch::{Batch, Limits};
use keepstep::cache::commands;
use keepstep::config::{self, Config, RulesFile};
use keepstep::decode::types::Types;
use keepstep::model::{Change, Column, Datum, Lsn, OldTuple, Relation, ReplicaIdentity, Timestamp, Tuple};
use keepstep::plan::{self, BoundTable, Note, Noted, Scratch, Transaction, later};
use keepstep::rules::bind::{BoundRule, bind};

/// Type names of the headers, and their OIDs in Postgres's `pg_type.dat`.
const TYPES: [(&str, u32); 12] = [
    ("bool", 16),
    ("int8", 20),
    ("int4", 23),
    ("text", 25),
    ("float8", 701),
    ("date", 1082),
    ("timestamp", 1114),
    ("timestamptz", 1184),
    ("interval", 1186),
    ("numeric", 1700),
    ("uuid", 2950),
    ("jsonb", 3802),
];

/// Rows as words; `None` is NULL.
type Row = Vec<Option<String>>;

/// A row as pgoutput sends it.
struct Encoded {
    columns: u16,
    bytes: Vec<u8>,
}

impl Encoded {
    fn tuple(&self) -> Tuple<'_> {
        Tuple { columns: self.columns, bytes: &self.bytes }
    }
}

struct Group {
    config: Config,
    /// Once for each replica identity.
    tables: Vec<BoundTable>,
}

/// Compares every case of the file, and shows all that differ.
fn check(path: &str) {
    let cases = fs::read_to_string(path).unwrap();
    let (mut wrong, mut count) = (String::new(), 0);
    for text in cases.split("\n== ").skip(1) {
        let (group, lines) = group(text);
        for line in lines {
            let (changes, expected) = line.split_once('|').unwrap_or_else(|| panic!("{path}: no `|` in {line}"));
            for table in &group.tables {
                count += 1;
                let shown = become_of(&group.config, table, changes.trim());
                if shown != expected.trim() {
                    let identity = table.relation.identity;
                    writeln!(wrong, "{line}\n  under {identity:?} becomes\n  {shown}").unwrap();
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{path}:\n{wrong}");
    assert!(count > 10, "{path}: only {count} cases");
}

/// The header and the lines of the cases.
fn group(text: &str) -> (Group, Vec<&str>) {
    let (mut columns, mut identities, mut prefixes) = ("", "default", "");
    let (mut rules, mut lines) = (String::new(), Vec::new());
    for line in text.lines().skip(1).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        match line.split_once(' ') {
            Some(("table", given)) => columns = given,
            Some(("identity", given)) => identities = given,
            Some(("prefix", given)) => prefixes = given,
            Some(("", rule)) => writeln!(rules, "{}", rule.trim()).unwrap(),
            _ => lines.push(line),
        }
    }
    if !rules.starts_with("[rule.") {
        rules = format!("[rule.r]\n{rules}");
    }
    let is_rule = |line: &str| line.starts_with("[rule.") && line.matches('.').count() == 1;
    let named = |line: &str| if is_rule(line) { format!("{line}\ntable = \"public.t\"") } else { line.to_owned() };
    let rules: Vec<String> = rules.lines().map(named).collect();
    let mut prefixes = prefixes.split_whitespace();
    let prefix = prefixes.next().unwrap_or_default();
    let also: Vec<&str> = prefixes.collect();
    let also = if also.is_empty() { String::new() } else { format!("also_prefix = {also:?}\n") };
    let text = format!(
        "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\nprefix = \"{prefix}\"\n\
         {also}{}\n",
        rules.join("\n")
    );
    let file = RulesFile { path: "cases.toml".into(), text };
    let (config, _) = config::parse(file, &|_| None).expect("a rules file");
    let table = |identity| bound(&config, relation(columns, identity));
    let tables = identities.split_whitespace().map(table).collect();
    (Group { config, tables }, lines)
}

fn relation(columns: &str, identity: &str) -> Relation {
    let identity = match identity {
        "default" => ReplicaIdentity::Default,
        "index" => ReplicaIdentity::Index,
        "full" => ReplicaIdentity::Full,
        "nothing" => ReplicaIdentity::Nothing,
        other => panic!("no replica identity: {other}"),
    };
    let column = |column: &str| {
        let (name, of_type) = column.split_once(':').unwrap();
        let type_name = of_type.trim_end_matches('*');
        let (_, type_oid) = *TYPES.iter().find(|(name, _)| *name == type_name).unwrap();
        let identity = match identity {
            ReplicaIdentity::Full => true,
            ReplicaIdentity::Nothing => false,
            _ => of_type.ends_with('*'),
        };
        Column { name: name.to_owned(), type_oid, type_modifier: -1, identity }
    };
    let columns = columns.split_whitespace().map(column).collect();
    Relation { oid: 1, schema: "public".into(), name: "t".into(), identity, columns }
}

fn bound(config: &Config, relation: Relation) -> BoundTable {
    let types = Types::builtin();
    let rules = (0..).zip(&config.rules).map(|(number, rule)| {
        let bound = bind(rule, number, &relation, None, &types, &config.redis.prefix);
        bound.unwrap_or_else(|unbound| panic!("{:?}", unbound.problems))
    });
    BoundTable { rules: rules.collect(), relation }
}

/// What the changes become, as the cases show it.
fn become_of(config: &Config, table: &BoundTable, changes: &str) -> String {
    let unlimited = || Batch::new(Limits { ops: usize::MAX, bytes: usize::MAX }, config.rules.len());
    let (mut batch, mut settled, mut notes) = (unlimited(), unlimited(), Vec::new());
    let mut again = unlimited();
    for (ordinal, change) in (1..).zip(changes.split(" & ")) {
        let transaction = Transaction {
            commit_lsn: Lsn(0xA1),
            commit_time: Timestamp(0),
            ordinal,
            epoch: 7,
            visible: false,
            released: false,
        };
        apply(table, change, transaction, &mut batch, (&mut settled, &mut again), &mut notes);
    }
    let mut shown = self::shown(&batch, config);
    let later = self::shown(&settled, config);
    if !later.is_empty() {
        write!(shown, " >> {later}").unwrap();
    }
    let again = self::shown(&again, config);
    if !again.is_empty() {
        write!(shown, " >>> {again}").unwrap();
    }
    for Note { what, .. } in notes {
        match what {
            Noted::Keyless => shown += " !keyless",
            Noted::Unrendered(why) => write!(shown, " !{}", why.label()).unwrap(),
            Noted::Swept => shown += " !swept",
            Noted::Incomplete(name) => {
                let named = name.iter().map(|(place, value)| {
                    let value = value.as_deref().map_or("-".into(), String::from_utf8_lossy);
                    format!("{}={value}", table.relation.columns[*place].name)
                });
                write!(shown, " !incomplete({})", named.collect::<Vec<_>>().join(",")).unwrap();
            }
        }
    }
    shown.trim().to_owned()
}

fn apply(
    table: &BoundTable,
    change: &str,
    transaction: Transaction,
    batch: &mut Batch,
    (settled, again): (&mut Batch, &mut Batch),
    notes: &mut Vec<Note>,
) {
    let (op, rows) = change.split_once(' ').unwrap_or((change, ""));
    let mut rows = rows.split("->").map(|row| words(row, table.relation.columns.len()));
    let first = rows.next().unwrap_or_default();
    let old = |new: Option<&Row>| old_image(table, &first, new);
    let image = |old| match table.relation.identity {
        ReplicaIdentity::Full => OldTuple::Full(Encoded::tuple(old)),
        _ => OldTuple::Key(Encoded::tuple(old)),
    };
    let mut planned = |change: Change<'_>| {
        plan::change(table, change, transaction, &mut Scratch::default(), batch, Some(settled), notes);
        let delays: BTreeSet<Duration> = table.rules.iter().filter_map(BoundRule::again_after).collect();
        delays.into_iter().for_each(|delay| plan::again(table, change, delay, &mut Scratch::default(), again));
    };
    match op {
        "insert" => planned(Change::Insert { new: encode(&first).tuple() }),
        "update" => {
            let new = rows.next().expect("`update OLD -> NEW`");
            let old = old(Some(&new));
            planned(Change::Update { old: old.as_ref().map(image), new: encode(&new).tuple() });
        }
        "delete" => planned(Change::Delete { old: old(None).as_ref().map(image).expect("a replica identity") }),
        "truncate" => {
            plan::truncate(table, transaction, batch, Some(settled));
            let delayed = table.rules.iter().filter(|rule| rule.again_after().is_some());
            delayed.for_each(|rule| later::everything_again(rule, again));
        }
        "gap" => {
            let visible = Transaction { visible: true, ..transaction };
            table.rules.iter().for_each(|rule| later::everything(rule, later::GAP, table, visible, settled));
        }
        "read" => {
            let row: Vec<_> = first.iter().map(|word| datum(word.as_deref())).collect();
            plan::row(table, &row, &mut 0, batch, notes);
        }
        other => panic!("no change: {other}"),
    }
}

/// What the replica identity logs of the old row.
fn old_image(table: &BoundTable, old: &Row, new: Option<&Row>) -> Option<Encoded> {
    let columns = &table.relation.columns;
    if table.relation.identity == ReplicaIdentity::Full {
        return Some(encode(old));
    }
    let same = |(place, column): (usize, &Column)| {
        !column.identity || new.is_some_and(|new| new[place] == old[place] || new[place].as_deref() == Some("~"))
    };
    if new.is_some() && columns.iter().enumerate().all(same) || !columns.iter().any(|column| column.identity) {
        return None;
    }
    let left = columns.iter().zip(old).map(|(column, word)| word.clone().filter(|_| column.identity));
    Some(encode(&left.collect()))
}

fn words(text: &str, count: usize) -> Row {
    let mut words = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (word, left) = match rest.strip_prefix('\'') {
            Some(quoted) => quoted.split_once('\'').expect("a closing quote"),
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        let null = word == "-" && !rest.starts_with('\'');
        words.push((!null).then(|| word.to_owned()));
        rest = left.trim_start();
    }
    assert!(words.is_empty() || words.len() == count, "{text}: {count} columns");
    words
}

fn datum(word: Option<&str>) -> Datum<'_> {
    match word {
        None => Datum::Null,
        Some("~") => Datum::UnchangedToast,
        Some(text) => Datum::Text(text.as_bytes()),
    }
}

fn encode(row: &Row) -> Encoded {
    let mut bytes = Vec::new();
    for word in row {
        match datum(word.as_deref()) {
            Datum::Null => bytes.push(b'n'),
            Datum::UnchangedToast => bytes.push(b'u'),
            Datum::Text(text) => {
                bytes.push(b't');
                bytes.extend_from_slice(&(text.len() as u32).to_be_bytes());
                bytes.extend_from_slice(text);
            }
        }
    }
    Encoded { columns: row.len() as u16, bytes }
}

/// The commands of a batch. Arguments are shown as they are, in single quotes where they are empty or hold spaces.
fn shown(batch: &Batch, config: &Config) -> String {
    let sweeps = commands::sweeps(batch, &config.redis).concat();
    let mut shown: Vec<String> = sweeps.iter().map(|sweep| format!("SWEEP {sweep}")).collect();
    shown.extend(commands::encode(batch, &config.redis, |_| true).iter().map(|command| {
        let words = command.args_iter().map(|argument| match argument {
            redis::Arg::Simple(bytes) => match String::from_utf8_lossy(bytes) {
                script if script.starts_with("if ARGV") => "SCRIPT".to_owned(),
                word if word.is_empty() || word.contains(' ') => format!("'{word}'"),
                word => word.into_owned(),
            },
            _ => "CURSOR".to_owned(),
        });
        words.collect::<Vec<_>>().join(" ")
    }));
    shown.join("; ")
}

macro_rules! cases {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            check(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/integration/cases/", stringify!($name), ".cases"));
        }
    )*};
}

cases!(rows conditions lives members stale later tags);
