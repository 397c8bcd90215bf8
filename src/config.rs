//! From the rules file to [`Config`]: every problem found in one pass, each with its span.
//!
//! Three steps: text that is not TOML is blanked out and reported (`syntax`); the rest is read table by table
//! (`section`, by the table of fields in [`fields`]); what must agree with each other is compared (`rule`). A
//! mistake never stops the reading: the field counts as absent and the next one is looked at. What only the database
//! can tell (columns, types, replica identity) is found when rules are bound.

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::model::Relation;
use crate::rules::expression::Expression;
use crate::rules::sql::Sql;
use crate::rules::template::Template;

pub mod code;
pub mod diagnostic;
mod document;
pub mod fields;
mod include;
mod interpolate;
pub(crate) mod mask;
mod mistake;
pub mod open;
pub(crate) mod quantity;
mod query;
pub(crate) mod rule;
mod section;
mod server;
mod sources;
mod syntax;

use code::Code;
use diagnostic::{Diagnostic, Severity};
use document::Document;
use open::{OpenRule, Table};
pub use sources::Sources;

/// How large a rules file may be, with all that it includes: far beyond thousands of rules, and no way to fill the memory by a wrong path.
const FILE_BYTES_MAX: u64 = 16 << 20;

/// A value and where it stands in the rules file (byte range).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spanned<T> {
    /// The value.
    pub value: T,
    /// Its bytes in the file, quotes included for strings.
    pub span: Range<usize>,
}

/// A string that never shows: not in `Debug`, not in logs, not in messages.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(value: impl Into<String>) -> Self {
        Secret(value.into())
    }

    /// The value, for whoever connects with it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("…")
    }
}

/// The whole rules file, resolved: defaults filled in, environment and files read.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file and those that it includes, for messages that come later (binding).
    pub file: Sources,
    /// `[postgres]`
    pub postgres: PostgresConfig,
    /// `[redis]`
    pub redis: RedisConfig,
    /// `[admin]`
    pub admin: AdminConfig,
    /// `[rule.NAME]`, in the order of the files; then what `[query.NAME]` means, as rules; then those made of `open`.
    pub rules: Vec<Rule>,
    /// Rules whose tables the catalog has to tell.
    pub open: Vec<OpenRule>,
    /// What it has told; what they come to is among `rules`. `None` while there are such rules and it was not asked.
    pub tables: Option<Vec<Table>>,
}

/// A rules file as read.
#[derive(Clone, PartialEq, Eq)]
pub struct RulesFile {
    /// Its path, as given.
    pub path: PathBuf,
    /// Its text, which may hold secrets: [`diagnostic::render`] is the way to show it.
    pub text: String,
}

impl std::fmt::Debug for RulesFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RulesFile").field("path", &self.path).finish_non_exhaustive()
    }
}

/// A rules file that cannot be used, with everything that is wrong with it.
#[derive(Clone, Debug)]
pub struct Problems {
    /// The file and those that it includes.
    pub file: Sources,
    /// Errors and warnings, in the order of the files; at least one error.
    pub diagnostics: Vec<Diagnostic>,
}

/// Looks up an environment variable.
pub type Environment<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// Reads the rules file at `path` and resolves it; gives its warnings too.
pub fn load(path: &Path, env: &Environment<'_>) -> Result<(Config, Vec<Diagnostic>), Problems> {
    match read_file(path, FILE_BYTES_MAX) {
        Ok(text) => parse(RulesFile { path: path.to_owned(), text }, env),
        Err(error) => {
            let problem =
                Diagnostic::error(Code::UnreadableFile, format!("the rules file cannot be read: {error}"), 0..0, "")
                    .help("name another one, or write it: `keepstep reference` lists every field");
            let file = RulesFile { path: path.to_owned(), text: String::new() };
            Err(Problems { file: file.into(), diagnostics: vec![problem] })
        }
    }
}

fn read_file(path: &Path, bytes_max: u64) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(bytes_max + 1).read_to_string(&mut text)?;
    if text.len() as u64 > bytes_max {
        return Err(io::Error::other(format!("the rules are larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// Resolves a rules file; gives its warnings too. Reads the files that `include` and `${file:…}` name.
pub fn parse(file: RulesFile, env: &Environment<'_>) -> Result<(Config, Vec<Diagnostic>), Problems> {
    let (file, document, mut diagnostics) = document::read(file, env);
    diagnostics.sort_by_key(|diagnostic| diagnostic.primary.span.start);
    let failed = diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error);
    match document {
        Some(Document { postgres, redis, admin, rules, open }) if !failed => {
            let tables = open.is_empty().then(Vec::new);
            Ok((Config { file, postgres, redis, admin, rules, tables, open }, diagnostics))
        }
        _ => Err(Problems { file, diagnostics }),
    }
}

/// `[postgres]`: where changes come from.
#[derive(Clone, Debug)]
pub struct PostgresConfig {
    /// The URL, environment and files filled in.
    pub url: Secret,
    /// How changes are received. Default by logical replication.
    pub source: Source,
    /// The replication slot, or the schema of the outbox. Default `keepstep`.
    pub slot: String,
    /// The publication. Default `keepstep`.
    pub publication: String,
    /// What a gap does. Default `reconcile`.
    pub on_gap: OnGap,
    /// Acknowledgements trail what the cache holds by this, so that a cache that lost its last seconds is replayed.
    /// Default 30 s.
    pub replay_window: Duration,
    /// How often an idle slot is moved forward by a logical message; `None` is never. Default 60 s.
    pub heartbeat: Option<Duration>,
    /// How long connecting may take. Default 10 s.
    pub connect_timeout: Duration,
    /// Beyond this many bytes of retained WAL the slot is given up, or with [`OnGap::Stop`] reported; of the outbox, see
    /// [`OnFull`]. Default 8 GiB.
    pub max_retained: u64,
    /// How many connections may read tables at a time. Default 2.
    pub query_connections: usize,
    /// How many rows a second are read from tables at most; `None` is no limit, the default.
    pub warm_rate: Option<u64>,
    /// What logical messages may command. Default nothing.
    pub message_commands: MessageCommands,
}

/// `source`: how changes are received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// By logical replication.
    Replication,
    /// From a table that triggers fill.
    Outbox(Outbox),
}

/// What the outbox alone has to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outbox {
    /// It is looked into at least that often. Default 1 s.
    pub poll_interval: Duration,
    /// Writers wake an idle daemon with NOTIFY. Default true.
    pub notify: bool,
    /// What happens when it holds more than `max_retained`. Default [`OnFull::Gap`].
    pub on_full: OnFull,
}

/// `on_full`: what happens to a full outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFull {
    /// It grows, and that is reported.
    Keep,
    /// Changes are no longer written to it, and the cache is reconciled later.
    Gap,
}

/// `message_commands`: which commands are obeyed that come as logical messages in the stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct MessageCommands {
    pub warm: bool,
    pub verify: bool,
    pub reload: bool,
}

/// What happens when history is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnGap {
    /// Make the cache right again from the tables.
    Reconcile,
    /// Exit with the reason.
    Stop,
}

/// `[redis]`: where keys go.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// The URL, environment and files filled in: `redis://`, `rediss://` or `redis+unix://`.
    pub url: Secret,
    /// Stands before every key.
    pub prefix: String,
    /// Every key is written and deleted under these too.
    pub also_prefix: Vec<String>,
    /// How long one batch may take before the connection counts as lost. Default 10 s.
    pub timeout: Duration,
    /// Acknowledge only after so many replicas have the batch (WAIT). Default 0.
    pub wait_replicas: u32,
    /// Root certificates (PEM) to trust instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// Client certificate and key (PEM).
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// A batch closes at this many cells. Default 4096.
    pub batch_ops: usize,
    /// A batch closes at this many bytes of keys and values. Default 4 MiB.
    pub batch_bytes: usize,
}

impl RedisConfig {
    /// Every prefix that keys are written under, `prefix` first.
    pub fn prefixes(&self) -> impl Iterator<Item = &str> {
        std::iter::once(self.prefix.as_str()).chain(self.also_prefix.iter().map(String::as_str))
    }
}

/// `[admin]`: the HTTP endpoint.
#[derive(Clone, Debug)]
pub struct AdminConfig {
    /// Where it listens; `None` is nowhere. Default `127.0.0.1:9847`.
    pub listen: Option<std::net::SocketAddr>,
    /// What other hosts must send as `Authorization: Bearer` for anything but probes and metrics.
    pub token: Option<Secret>,
}

/// `[rule.NAME]` as the file gives it, checked for itself; columns are not resolved yet.
#[derive(Clone, Debug)]
pub struct Rule {
    /// NAME, with the span of the table header's key.
    pub name: Spanned<String>,
    /// `table = "schema.table"`, exact as in the catalog; only inside of an [`OpenRule`] it may be a pattern.
    pub table: Spanned<TableName>,
    /// `on`: the operations that count. Default all.
    pub on: Operations,
    /// Whether `on` was given.
    pub on_given: bool,
    /// `vars`: names that templates may use as they use columns.
    pub vars: Vec<(Spanned<String>, Spanned<Template>)>,
    /// Names in its templates are those of `vars`, or what `lookup` gives, and not columns of the table.
    pub names_are_given: bool,
    /// `when`: the rows that count; `None` is all.
    pub when: Option<Spanned<Expression>>,
    /// `key`, `value`: a row is a key, or a member of one.
    pub write: Option<WriteAction>,
    /// `delete`: a row change makes these keys stale.
    pub delete: Vec<Spanned<Template>>,
    /// `redelete`: what is stale is deleted again.
    pub redelete: Redelete,
    /// What waits until the change is visible.
    pub settled: Settled,
    /// `lookup`: what templates need of other tables.
    pub lookup: Option<Spanned<Sql>>,
    /// How many rows of the lookup's result name keys. With more, everything that the templates can have made goes.
    pub rows_max: usize,
    /// The keys of `delete` are not deleted: this writes them anew.
    pub refresh: Option<Arc<Query>>,
    /// It is the one rule of its query that answers for all keys which there should be.
    pub lists: bool,
    /// `changed`: the columns of which one must have changed for an UPDATE to count; `None` is any.
    pub changed: Option<Vec<Spanned<String>>>,
    /// A hash over everything that decides which keys and values the rule makes (hex).
    pub fingerprint: String,
}

/// `[query.NAME]` with `mode = "refresh"`: a key that holds the result of a query.
#[derive(Clone, Debug)]
pub struct Query {
    /// NAME, with the span of the table header's key.
    pub name: Spanned<String>,
    /// `key`; its placeholders are the parameters.
    pub key: Spanned<Template>,
    /// `sql`
    pub sql: Spanned<Sql>,
    /// `shape`
    pub shape: Shape,
    /// `keys`: all there should be. Only [`Query::listing`] says what holds without it.
    pub keys: Option<Spanned<Sql>>,
    /// `every`: how often all of them are read again; `None` is never, the default.
    pub every: Option<Duration>,
    /// `ttl`, and the share by which `jitter` shortens it.
    pub ttl: Option<(Duration, f64)>,
    /// `min_interval`: how long a key is left alone after it was read. Default not at all.
    pub min_interval: Duration,
}

/// How it is known which keys of a query there should be.
#[derive(Clone, Copy, Debug)]
pub enum Listing<'q> {
    /// There is one: it has no parameters.
    One,
    /// This query says so.
    Sql(&'q Spanned<Sql>),
}

impl Query {
    /// How it is known which keys there should be; `None` if it is not.
    pub fn listing(&self) -> Option<Listing<'_>> {
        let one = || self.key.value.placeholders().next().is_none().then_some(Listing::One);
        self.keys.as_ref().map(Listing::Sql).or_else(one)
    }

    /// The names of its parameters, each once, in the order of the key.
    pub fn parameters(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for placeholder in self.key.value.placeholders() {
            if !names.contains(&placeholder.name.as_str()) {
                names.push(&placeholder.name);
            }
        }
        names
    }
}

/// What of a query's result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A JSON array of all rows.
    Rows,
    /// The first row, as a JSON object.
    Row,
    /// The one column of the first row, as text.
    Value,
}

impl Shape {
    /// As in `shape`.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Rows => "rows",
            Shape::Row => "row",
            Shape::Value => "value",
        }
    }
}

/// `redelete`: whoever fills a deleted key can still have read the old row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redelete {
    /// It is deleted once.
    Off,
    /// Keys that were deleted before the change was visible are deleted again once it is. The default.
    Settled,
    /// So are they, and everything that is stale once more so long after that.
    After(Duration),
}

impl Rule {
    /// Whether the key of a row may be missing: it is filled when it is asked for, not because the row is there.
    pub fn may_miss(&self) -> bool {
        let write = self.write.as_ref().filter(|write| !matches!(write.value, Value::Member { .. }));
        write.is_some_and(|write| !write.warm || write.present_only)
    }

    /// Whether it gives keys tags, or deletes by them.
    pub fn has_tags(&self) -> bool {
        let gives = self.write.as_ref().is_some_and(|write| !write.tags.is_empty());
        gives || !self.settled.delete_tags.is_empty()
    }
}

/// What happens once whoever reads the tables sees a change.
#[derive(Clone, Debug, Default)]
pub struct Settled {
    /// `delete_match`: keys that match are stale.
    pub delete_match: Vec<Spanned<Template>>,
    /// `delete_tags`: every key with such a tag is stale.
    pub delete_tags: Vec<Spanned<Template>>,
    /// `bump`: these keys get a new generation.
    pub bump: Vec<Spanned<Template>>,
    /// `stream`
    pub stream: Option<StreamAction>,
    /// `publish`: the channel.
    pub publish: Option<Spanned<Template>>,
}

/// `stream`: an entry for each change.
#[derive(Clone, Debug)]
pub struct StreamAction {
    /// `key`
    pub key: Spanned<Template>,
    /// `maxlen`: about how many entries it keeps.
    pub maxlen: Option<u64>,
    /// `ops`: the operations that are told. Default all that count.
    pub ops: Operations,
}

/// A table's name, exact as in the catalog.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableName {
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
}

impl TableName {
    /// As in the rules file: a part stands in quotes where it would be misread without.
    pub fn written(&self) -> String {
        let part = |name: &str| match name.contains(['.', '"']) {
            true => format!("\"{}\"", name.replace('"', "\"\"")),
            false => name.to_owned(),
        };
        format!("{}.{}", part(&self.schema), part(&self.name))
    }
}

impl From<&Relation> for TableName {
    fn from(relation: &Relation) -> Self {
        TableName { schema: relation.schema.clone(), name: relation.name.clone() }
    }
}

impl std::fmt::Display for TableName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

/// Which row operations a rule obeys. TRUNCATE counts where DELETE does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub struct Operations {
    pub insert: bool,
    pub update: bool,
    pub delete: bool,
}

impl Operations {
    /// Every operation.
    pub const ALL: Operations = Operations { insert: true, update: true, delete: true };

    /// Whether each of these is among the others.
    pub fn is_within(self, others: Operations) -> bool {
        (others.insert || !self.insert) && (others.update || !self.update) && (others.delete || !self.delete)
    }
}

/// Write-through: the row is rendered into a key.
#[derive(Clone, Debug)]
pub struct WriteAction {
    /// `key`
    pub key: Spanned<Template>,
    /// `value`
    pub value: Value,
    /// `ttl`, `expire_at`, `keep_ttl`
    pub life: Life,
    /// `write = "present"`: only keys that exist are refreshed.
    pub present_only: bool,
    /// `on_delete = "keep"`: a deleted row's key is left to its TTL.
    pub keep_on_delete: bool,
    /// `owns`: every key that the template can make is the rule's, whatever a text in it looks like. Default false.
    pub owns: bool,
    /// `warm`: keys of rows that do not change are filled without being asked for. Default true.
    pub warm: bool,
    /// `every`: how often keys of rows that do not change are written again; `None` is never, the default.
    pub every: Option<Duration>,
    /// `audit`: the share of the rows (1.0 is all) that is compared each minute; `None` is never, the default.
    pub audit: Option<f64>,
    /// `tags`: sets that the key is a member of.
    pub tags: Vec<Spanned<Template>>,
}

/// What a key holds.
#[derive(Clone, Debug)]
pub enum Value {
    /// `json`, `hash`, `rejson`: the row itself.
    Row(RowValue),
    /// `string`: what `template` gives.
    Text(Spanned<Template>),
    /// `set`, `zset`: the row is one of its members.
    Member {
        /// `member`
        member: Spanned<Template>,
        /// `score`, of a sorted set.
        score: Option<Spanned<Expression>>,
    },
}

/// The row as a value.
#[derive(Clone, Debug)]
pub struct RowValue {
    /// How it is kept.
    pub form: RowForm,
    /// `columns`; `["*"]` is every published column.
    pub columns: Spanned<ColumnSelection>,
    /// `rename = { column = "field" }`
    pub rename: Vec<(Spanned<String>, Spanned<String>)>,
    /// `strings`: columns rendered as JSON strings.
    pub strings: Vec<Spanned<String>>,
    /// `compute = { field = "expression" }`
    pub compute: Vec<(Spanned<String>, Spanned<Expression>)>,
}

/// How a row is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowForm {
    /// A string that holds what `row_to_json` gives.
    Json,
    /// A hash.
    Hash,
    /// Redis's JSON type.
    Rejson,
}

impl RowForm {
    /// As in `value`.
    pub fn name(self) -> &'static str {
        match self {
            RowForm::Json => "json",
            RowForm::Hash => "hash",
            RowForm::Rejson => "rejson",
        }
    }
}

/// How long a written key lives.
#[derive(Clone, Debug)]
pub enum Life {
    /// As long as its row.
    Forever,
    /// `ttl`, shortened by `jitter`: a share from 0.0 to below 1.0.
    Ttl(Lifetime, f64),
    /// `expire_at`
    Until(Spanned<Expression>),
    /// `keep_ttl`
    Keep,
}

/// `ttl`
#[derive(Clone, Debug)]
pub enum Lifetime {
    /// The same for every row.
    Constant(Duration),
    /// An expression that gives a duration.
    OfRow(Spanned<Expression>),
}

impl Life {
    /// The `ttl`, if it is the same for every row.
    pub fn constant(&self) -> Option<Duration> {
        match self {
            Life::Ttl(Lifetime::Constant(ttl), _) => Some(*ttl),
            _ => None,
        }
    }
}

/// `columns`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ColumnSelection {
    /// `["*"]`
    All,
    /// These, in this order.
    Named(Vec<Spanned<String>>),
}

#[cfg(test)]
pub(crate) mod tests;
