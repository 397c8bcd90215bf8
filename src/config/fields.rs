//! Every field of the rules file: the one table behind accepted names, suggestions, limits, `keepstep reference` and
//! the JSON Schema.
//!
//! The parser asks for a field by its name and finds its limits here; a field that it reads and that is not here, or
//! that is here and not read, fails a test.

use std::time::Duration;

/// A table of the rules file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// What stands above the first header.
    Top,
    /// `[postgres]`
    Postgres,
    /// `[redis]`
    Redis,
    /// `[admin]`
    Admin,
    /// `[defaults]`
    Defaults,
    /// `[rule.NAME]`
    Rule,
    /// `stream` of a rule
    Stream,
    /// `publish` of a rule
    Publish,
    /// `[query.NAME]`
    Query,
    /// `on` of a query
    On,
}

impl Table {
    /// Every table, in the order of the reference.
    pub const ALL: [Table; 10] = [
        Self::Top,
        Self::Postgres,
        Self::Redis,
        Self::Admin,
        Self::Defaults,
        Self::Rule,
        Self::Stream,
        Self::Publish,
        Self::Query,
        Self::On,
    ];

    /// Those that have a header of their own.
    pub const AT_TOP: [Table; 6] = [Self::Postgres, Self::Redis, Self::Admin, Self::Defaults, Self::Rule, Self::Query];

    /// Its key at the top of the file.
    pub fn key(self) -> &'static str {
        match self {
            Self::Top => "",
            Self::Postgres => "postgres",
            Self::Redis => "redis",
            Self::Admin => "admin",
            Self::Defaults => "defaults",
            Self::Rule => "rule",
            Self::Stream => "stream",
            Self::Publish => "publish",
            Self::Query => "query",
            Self::On => "on",
        }
    }

    /// Its header.
    pub fn header(self) -> &'static str {
        match self {
            Self::Top => "the beginning of the file",
            Self::Postgres => "[postgres]",
            Self::Redis => "[redis]",
            Self::Admin => "[admin]",
            Self::Defaults => "[defaults]",
            Self::Rule => "[rule.NAME]",
            Self::Stream => "[rule.NAME.stream]",
            Self::Publish => "[rule.NAME.publish]",
            Self::Query => "[query.NAME]",
            Self::On => "[[query.NAME.on]]",
        }
    }

    /// What it is for.
    pub fn meaning(self) -> &'static str {
        match self {
            Self::Top => "What stands above the first header.",
            Self::Postgres => "Where changes come from.",
            Self::Redis => "Where keys go.",
            Self::Admin => "The HTTP endpoint for metrics, health and status.",
            Self::Defaults => "What every rule with a `key` takes that does not say otherwise.",
            Self::Rule => {
                "What a row change of one table does: write a key (`key`, `value`, `columns`), make keys stale \
                 (`delete`, `delete_tags`, `delete_match`, `bump`), tell others (`stream`, `publish`), or several of \
                 these. NAME is the rule's name in metrics and messages."
            }
            Self::Stream => {
                "An entry of a Redis stream for each change, once the change is visible in Postgres: `op`, `table`, `key`, \
                 `before`, `after`, `epoch`, `lsn`, `ordinal` and `ts`. Consumers tell repeats by `epoch`, `lsn` and `ordinal`. Where \
                 changes may have been missed, an entry has the `op` `gap`, the `ordinal` 0 and no row: that one is never a repeat."
            }
            Self::Publish => {
                "A message for each change, once the change is visible in Postgres: JSON with `op`, `table`, `key` and \
                 `lsn`."
            }
            Self::Query => {
                "A key that is made from rows of several tables. NAME is the query's name in messages; in metrics each `on` is a \
                 rule of its own, NAME.1, NAME.2 and so on."
            }
            Self::On => "Which rows of one table make which keys of the query stale.",
        }
    }

    /// Whether `${NAME}`, `${NAME:-default}` and `${file:/path}` are filled in.
    pub fn interpolates(self) -> bool {
        matches!(self, Self::Postgres | Self::Redis | Self::Admin)
    }

    /// Its fields.
    pub fn fields(self) -> impl Iterator<Item = &'static Field> + Clone {
        FIELDS.iter().filter(move |field| field.table == self)
    }

    /// Its field of this name.
    pub fn field(self, name: &str) -> Option<&'static Field> {
        self.fields().find(|field| field.name == name)
    }
}

/// A field of the rules file.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// The table it stands in.
    pub table: Table,
    /// Its name.
    pub name: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// What holds without it.
    pub default: Fallback,
    /// What it does.
    pub meaning: &'static str,
    /// The fields of the same table that must be given with it.
    pub needs: &'static [&'static str],
    /// What else it needs and excludes; may be empty.
    pub limits: &'static str,
    /// A value, as TOML.
    pub example: &'static str,
}

/// What a field takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Any string.
    Text,
    /// A string with a URL.
    Url,
    /// A path, as a string.
    Path,
    /// `"host:port"` with an IP address, or `"off"`.
    Address,
    /// One of these strings.
    Choice(&'static [&'static str]),
    /// A string such as `"12h"` between two durations; `off` says whether `"off"` is one of its values.
    Duration {
        /// The least.
        min: Duration,
        /// The most.
        max: Duration,
        /// Whether `"off"` is allowed.
        off: bool,
    },
    /// One of these strings, or one such as `"30s"` between two durations.
    ChoiceOrDuration {
        /// The strings.
        choices: &'static [&'static str],
        /// The least.
        min: Duration,
        /// The most.
        max: Duration,
    },
    /// A string such as `"8GiB"` between two numbers of bytes.
    Size {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// A string such as `"10%"`.
    Share,
    /// A string such as `"5000/s"`, or `"off"`.
    RowsPerSecond,
    /// A string such as `"0.1%/min"`, or `"off"`.
    SharePerMinute,
    /// `true` or `false`.
    Flag,
    /// An integer between two.
    Count {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// `"schema.table"`
    TableName,
    /// A key template.
    Template,
    /// An array of key templates.
    Templates,
    /// An array of strings.
    Texts,
    /// An array of column names.
    Columns,
    /// An array of some of these strings.
    Choices(&'static [&'static str]),
    /// A table of strings.
    Pairs,
    /// An expression.
    Expression,
    /// A table of its own, with fields of its own.
    Section,
    /// Several of them.
    Sections,
}

/// What holds without a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallback {
    /// The file is refused.
    Required,
    /// Nothing.
    Absent,
    /// This value, as TOML.
    Value(&'static str),
}

/// A second, a day, and the longest time that anything may be given.
const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const TEN_YEARS: Duration = Duration::from_secs(3_650 * 24 * 60 * 60);

const TTL: Kind = Kind::Duration { min: Duration::from_millis(100), max: TEN_YEARS, off: true };
const WRITE: Kind = Kind::Choice(&["always", "present"]);
const ON_DELETE: Kind = Kind::Choice(&["delete", "keep"]);

const TTL_MEANING: &str = "How long a written key lives; `\"off\"` is for ever. A row that does not change is not \
                           written again, so its key goes when the time is over.";
const JITTER_MEANING: &str = "Each TTL is shortened at random by up to this share, so that keys written together do \
                              not expire together.";
const WRITE_MEANING: &str = "`\"present\"` refreshes only keys that exist, for applications that fill their cache \
                             themselves; `\"always\"` writes every row.";
const ON_DELETE_MEANING: &str = "`\"keep\"` leaves a deleted row's key to its TTL, also where TRUNCATE deletes the row; `\"delete\"` \
                                 removes it. The key leaves its `tags` either way.";

const EVERY: Kind = Kind::Duration { min: Duration::from_secs(1), max: TEN_YEARS, off: true };
const EVERY_MEANING: &str = "The rows are read and their keys written again that often, so that their TTL never empties \
                             the cache. Times are counted from 1970 in UTC: `\"12h\"` is at 0:00 and 12:00.";
const WARM_MEANING: &str = "Rows that were there before get their keys at a first start, and by `keepstep warm`; `false` leaves \
                            them out unless the rule is named.";
const AUDIT_MEANING: &str = "So much of the rows is compared with its keys, in the background and for ever; what differs is \
                             counted and reported.";

/// The table.
pub const FIELDS: &[Field] = &[
    Field {
        table: Table::Top,
        name: "include",
        kind: Kind::Texts,
        default: Fallback::Absent,
        meaning: "Files with more rules, for many of them: paths beside this file, with `*` in the last part for anything. \
                  They are read in this order, and by name where there are several. Each holds `[rule.NAME]` and \
                  nothing else.",
        needs: &[],
        limits: "At most 1000 files, and 16 MiB with this one.",
        example: "[\"rules.d/*.toml\"]",
    },
    Field {
        table: Table::Postgres,
        name: "url",
        kind: Kind::Url,
        default: Fallback::Required,
        meaning: "`postgresql://user@host:port/database`. A driver suffix as in `postgresql+asyncpg://` is dropped.",
        needs: &[],
        limits: "",
        example: "\"${DATABASE_URL}\"",
    },
    Field {
        table: Table::Postgres,
        name: "source",
        kind: Kind::Choice(&["replication", "outbox"]),
        default: Fallback::Value("\"replication\""),
        meaning: "How changes are received: by logical replication, or from a table that triggers fill (`\"outbox\"`), for servers \
                  without logical decoding.",
        needs: &[],
        limits: "",
        example: "\"outbox\"",
    },
    Field {
        table: Table::Postgres,
        name: "poll_interval",
        kind: Kind::Duration { min: Duration::from_millis(10), max: DAY, off: false },
        default: Fallback::Value("\"1s\""),
        meaning: "The outbox is looked into at least that often, whether a writer has sent NOTIFY or not.",
        needs: &[],
        limits: "For `source = \"outbox\"` alone.",
        example: "\"200ms\"",
    },
    Field {
        table: Table::Postgres,
        name: "notify",
        kind: Kind::Flag,
        default: Fallback::Value("true"),
        meaning: "Writers wake an idle keepstep with NOTIFY; `false` leaves it at `poll_interval`, for databases where NOTIFY is not \
                  wanted.",
        needs: &[],
        limits: "For `source = \"outbox\"` alone.",
        example: "false",
    },
    Field {
        table: Table::Postgres,
        name: "on_full",
        kind: Kind::Choice(&["gap", "keep"]),
        default: Fallback::Value("\"gap\""),
        meaning: "What happens while the outbox holds more than `max_retained` because nobody reads it: changes are no longer \
                  written to it, and the rules are reconciled later (`\"gap\"`), or it grows on, which is only reported \
                  (`\"keep\"`).",
        needs: &[],
        limits: "For `source = \"outbox\"` alone. A change of it takes effect with `keepstep setup`.",
        example: "\"keep\"",
    },
    Field {
        table: Table::Postgres,
        name: "slot",
        kind: Kind::Text,
        default: Fallback::Value("\"keepstep\""),
        meaning: "The replication slot, or the schema that the outbox lies in. Each cache needs its own.",
        needs: &[],
        limits: "Lower-case letters, digits and `_`, at most 63.",
        example: "\"keepstep\"",
    },
    Field {
        table: Table::Postgres,
        name: "publication",
        kind: Kind::Text,
        default: Fallback::Value("\"keepstep\""),
        meaning: "The publication that names the tables.",
        needs: &[],
        limits: "At most 63 bytes.",
        example: "\"keepstep\"",
    },
    Field {
        table: Table::Postgres,
        name: "on_gap",
        kind: Kind::Choice(&["reconcile", "stop"]),
        default: Fallback::Value("\"reconcile\""),
        meaning: "What happens when the log no longer holds what was missed: make the cache right again from the \
                  tables, or exit with the reason.",
        needs: &[],
        limits: "",
        example: "\"stop\"",
    },
    Field {
        table: Table::Postgres,
        name: "replay_window",
        kind: Kind::Duration { min: Duration::ZERO, max: DAY, off: false },
        default: Fallback::Value("\"30s\""),
        meaning: "Acknowledgements to Postgres trail what the cache holds by this, so that a cache that lost its last \
                  seconds is replayed.",
        needs: &[],
        limits: "",
        example: "\"30s\"",
    },
    Field {
        table: Table::Postgres,
        name: "heartbeat",
        kind: Kind::Duration { min: SECOND, max: DAY, off: true },
        default: Fallback::Value("\"60s\""),
        meaning: "How often a logical message moves an idle slot forward while other databases write.",
        needs: &[],
        limits: "",
        example: "\"60s\"",
    },
    Field {
        table: Table::Postgres,
        name: "connect_timeout",
        kind: Kind::Duration { min: Duration::from_millis(100), max: Duration::from_secs(600), off: false },
        default: Fallback::Value("\"10s\""),
        meaning: "How long connecting may take.",
        needs: &[],
        limits: "",
        example: "\"10s\"",
    },
    Field {
        table: Table::Postgres,
        name: "max_retained",
        kind: Kind::Size { min: 1 << 20, max: 1 << 50 },
        default: Fallback::Value("\"8GiB\""),
        meaning: "A slot that makes Postgres keep more WAL than this is given up, because a full disk is worse than a cold cache: \
                  the rules are reconciled on a new one. With `on_gap = \"stop\"` it is only reported, in a metric and in the \
                  log. For an outbox that grows beyond it see `on_full`.",
        needs: &[],
        limits: "",
        example: "\"8GiB\"",
    },
    Field {
        table: Table::Postgres,
        name: "query_connections",
        kind: Kind::Count { min: 1, max: 64 },
        default: Fallback::Value("2"),
        meaning: "How many connections run the queries of `lookup` and `[query.NAME]` at a time. One of them is for `lookup`, or one \
                  more where there is only one and both are used. Warming, reconciling and verifying have two of their own.",
        needs: &[],
        limits: "",
        example: "2",
    },
    Field {
        table: Table::Postgres,
        name: "warm_rate",
        kind: Kind::RowsPerSecond,
        default: Fallback::Value("\"off\""),
        meaning: "How many rows a second they read at most, all together; `\"off\"` is no limit.",
        needs: &[],
        limits: "",
        example: "\"5000/s\"",
    },
    Field {
        table: Table::Postgres,
        name: "message_commands",
        kind: Kind::Choices(&["warm", "verify", "reload"]),
        default: Fallback::Absent,
        meaning: "Commands that are obeyed when they come from SQL, as `select pg_logical_emit_message(true, \
                  'keepstep', '{\"command\": \"warm\", \"rule\": \"product\"}')`. Every role that may connect can send them.",
        needs: &[],
        limits: "",
        example: "[\"warm\"]",
    },
    Field {
        table: Table::Redis,
        name: "url",
        kind: Kind::Url,
        default: Fallback::Required,
        meaning: "`redis://user:password@host:port/database`, `rediss://` with TLS, or `redis+unix:///path/to/socket`.",
        needs: &[],
        limits: "",
        example: "\"${REDIS_URL}\"",
    },
    Field {
        table: Table::Redis,
        name: "prefix",
        kind: Kind::Text,
        default: Fallback::Value("\"\""),
        meaning: "Stands before every key: tenant, application, cache version.",
        needs: &[],
        limits: "",
        example: "\"shop:v1:\"",
    },
    Field {
        table: Table::Redis,
        name: "also_prefix",
        kind: Kind::Texts,
        default: Fallback::Absent,
        meaning: "Every key is written and deleted under these prefixes too, while applications that read different ones \
                  run side by side. Progress stands under `prefix` alone.",
        needs: &[],
        limits: "At most 8. None of the prefixes begins with another one.",
        example: "[\"shop:v0:\"]",
    },
    Field {
        table: Table::Redis,
        name: "timeout",
        kind: Kind::Duration { min: Duration::from_millis(100), max: Duration::from_secs(600), off: false },
        default: Fallback::Value("\"10s\""),
        meaning: "How long one batch may take before the connection counts as lost.",
        needs: &[],
        limits: "",
        example: "\"10s\"",
    },
    Field {
        table: Table::Redis,
        name: "wait_replicas",
        kind: Kind::Count { min: 0, max: 100 },
        default: Fallback::Value("0"),
        meaning: "Changes are acknowledged to Postgres only after so many replicas have them (WAIT).",
        needs: &[],
        limits: "",
        example: "1",
    },
    Field {
        table: Table::Redis,
        name: "ca_file",
        kind: Kind::Path,
        default: Fallback::Absent,
        meaning: "Root certificates (PEM) to trust instead of the system's.",
        needs: &[],
        limits: "Needs `rediss://`.",
        example: "\"/etc/ssl/redis-ca.pem\"",
    },
    Field {
        table: Table::Redis,
        name: "client_cert",
        kind: Kind::Path,
        default: Fallback::Absent,
        meaning: "The client's certificate (PEM).",
        needs: &["client_key"],
        limits: "Needs `rediss://`.",
        example: "\"/etc/ssl/keepstep.pem\"",
    },
    Field {
        table: Table::Redis,
        name: "client_key",
        kind: Kind::Path,
        default: Fallback::Absent,
        meaning: "The client's private key (PEM).",
        needs: &["client_cert"],
        limits: "Needs `rediss://`.",
        example: "\"/etc/ssl/keepstep.key\"",
    },
    Field {
        table: Table::Redis,
        name: "batch_ops",
        kind: Kind::Count { min: 1, max: 1_000_000 },
        default: Fallback::Value("4096"),
        meaning: "A batch closes at this many keys.",
        needs: &[],
        limits: "",
        example: "4096",
    },
    Field {
        table: Table::Redis,
        name: "batch_bytes",
        kind: Kind::Size { min: 1 << 10, max: 256 << 20 },
        default: Fallback::Value("\"4MiB\""),
        meaning: "A batch closes at this many bytes of keys and values.",
        needs: &[],
        limits: "",
        example: "\"4MiB\"",
    },
    Field {
        table: Table::Admin,
        name: "listen",
        kind: Kind::Address,
        default: Fallback::Value("\"127.0.0.1:9847\""),
        meaning: "Where the endpoint listens; `\"off\"` is nowhere.",
        needs: &[],
        limits: "",
        example: "\"0.0.0.0:9847\"",
    },
    Field {
        table: Table::Admin,
        name: "token",
        kind: Kind::Text,
        default: Fallback::Absent,
        meaning: "What other hosts must send as `Authorization: Bearer` for anything but probes and metrics. Without \
                  it only loopback is answered.",
        needs: &[],
        limits: "",
        example: "\"${file:/run/secrets/keepstep_token}\"",
    },
    Field {
        table: Table::Defaults,
        name: "ttl",
        kind: TTL,
        default: Fallback::Value("\"off\""),
        meaning: TTL_MEANING,
        needs: &[],
        limits: "",
        example: "\"1d\"",
    },
    Field {
        table: Table::Defaults,
        name: "jitter",
        kind: Kind::Share,
        default: Fallback::Value("\"0%\""),
        meaning: JITTER_MEANING,
        needs: &[],
        limits: "",
        example: "\"10%\"",
    },
    Field {
        table: Table::Defaults,
        name: "every",
        kind: EVERY,
        default: Fallback::Value("\"off\""),
        meaning: EVERY_MEANING,
        needs: &[],
        limits: "",
        example: "\"12h\"",
    },
    Field {
        table: Table::Defaults,
        name: "write",
        kind: WRITE,
        default: Fallback::Value("\"always\""),
        meaning: WRITE_MEANING,
        needs: &[],
        limits: "",
        example: "\"present\"",
    },
    Field {
        table: Table::Defaults,
        name: "on_delete",
        kind: ON_DELETE,
        default: Fallback::Value("\"delete\""),
        meaning: ON_DELETE_MEANING,
        needs: &[],
        limits: "",
        example: "\"keep\"",
    },
    Field {
        table: Table::Defaults,
        name: "warm",
        kind: Kind::Flag,
        default: Fallback::Value("true"),
        meaning: WARM_MEANING,
        needs: &[],
        limits: "",
        example: "false",
    },
    Field {
        table: Table::Defaults,
        name: "audit",
        kind: Kind::SharePerMinute,
        default: Fallback::Value("\"off\""),
        meaning: AUDIT_MEANING,
        needs: &[],
        limits: "",
        example: "\"0.1%/min\"",
    },
    Field {
        table: Table::Rule,
        name: "table",
        kind: Kind::TableName,
        default: Fallback::Required,
        meaning: "The table, with its schema, exactly as in the catalog. A partitioned table is named by its root. With `*` for \
                  any text it is a pattern, and the rule is about every table that matches, at any time: \
                  `\"tenant_*.products\"`. In templates `{_schema}` and `{_table}` are the table's name, and `{_pk}` is its \
                  primary key, with `:` between the columns.",
        needs: &[],
        limits: "A name that holds a dot stands in double quotes: `'public.\"a.b\"'`. A pattern has no quotes; it matches ordinary \
                 and partitioned tables that are logged. The key of a rule with a pattern holds `{_schema}` where the schema has a \
                 `*`, and `{_table}` where the name has one.",
        example: "\"public.products\"",
    },
    Field {
        table: Table::Rule,
        name: "on",
        kind: Kind::Choices(&["insert", "update", "delete"]),
        default: Fallback::Value("[\"insert\", \"update\", \"delete\"]"),
        meaning: "The row changes that count. TRUNCATE counts where `delete` does.",
        needs: &[],
        limits: "",
        example: "[\"insert\", \"update\"]",
    },
    Field {
        table: Table::Rule,
        name: "vars",
        kind: Kind::Pairs,
        default: Fallback::Absent,
        meaning: "Names that the rule's templates may use as they use columns: \
                  `vars = { url = \"https://shop.example/p/{id}/\" }`, then `{url|md5}`.",
        needs: &[],
        limits: "",
        example: "{ url = \"https://shop.example/p/{id}/\" }",
    },
    Field {
        table: Table::Rule,
        name: "key",
        kind: Kind::Template,
        default: Fallback::Absent,
        meaning: "The key that a row is written to: `{column}`, `{column?default}` for NULL, filters `{column|lower}`, \
                  `upper`, `urlencode`, `md5`, `sha256`, and `{{` `}}` for braces. It begins with a literal.",
        needs: &["value"],
        limits: "",
        example: "\"product:{id}\"",
    },
    Field {
        table: Table::Rule,
        name: "value",
        kind: Kind::Choice(&["json", "hash", "rejson", "string", "set", "zset"]),
        default: Fallback::Absent,
        meaning: "What the key holds. `\"json\"`: a string with what Postgres's `row_to_json` gives for `columns`. \
                  `\"hash\"`: a field for each of `columns` that is not NULL, in text form, replaced whole. `\"rejson\"`: a \
                  value of Redis's JSON type. `\"string\"`: what `template` gives. `\"set\"` and `\"zset\"`: the row is \
                  `member` of a set, or of a sorted set with `score`.",
        needs: &["key"],
        limits: "`json`, `hash` and `rejson` need `columns`; `string` needs `template`; `set` needs `member`; `zset` needs \
                 `member` and `score`.",
        example: "\"json\"",
    },
    Field {
        table: Table::Rule,
        name: "template",
        kind: Kind::Template,
        default: Fallback::Absent,
        meaning: "The value, with placeholders as in `key`. If one of them is NULL and has no default, there is no key.",
        needs: &["key"],
        limits: "Only with `value = \"string\"`.",
        example: "\"{price} {currency}\"",
    },
    Field {
        table: Table::Rule,
        name: "member",
        kind: Kind::Template,
        default: Fallback::Absent,
        meaning: "What of the row is a member of the set, with placeholders as in `key`.",
        needs: &["key"],
        limits: "Only with `value = \"set\"` or `\"zset\"`.",
        example: "\"{id}\"",
    },
    Field {
        table: Table::Rule,
        name: "score",
        kind: Kind::Expression,
        default: Fallback::Absent,
        meaning: "The member's score, as an expression that gives a number. A row whose score is NULL is no member.",
        needs: &["member"],
        limits: "Only with `value = \"zset\"`.",
        example: "\"row.rank\"",
    },
    Field {
        table: Table::Rule,
        name: "when",
        kind: Kind::Expression,
        default: Fallback::Absent,
        meaning: "Only rows for which this is true count: a row that leaves the condition loses its key. Where it is not known \
                  whether an old row met it, it counts as if it had.",
        needs: &[],
        limits: "",
        example: "\"row.active && row.stock > 0\"",
    },
    Field {
        table: Table::Rule,
        name: "compute",
        kind: Kind::Pairs,
        default: Fallback::Absent,
        meaning: "More fields of the value, each an expression: `compute = { total = \"row.price * row.qty\" }`.",
        needs: &["columns"],
        limits: "",
        example: "{ total = \"row.price * row.qty\" }",
    },
    Field {
        table: Table::Rule,
        name: "expire_at",
        kind: Kind::Expression,
        default: Fallback::Absent,
        meaning: "When the key goes, as an expression that gives a time. NULL is never.",
        needs: &["key"],
        limits: "Not together with `ttl` or `keep_ttl`.",
        example: "\"row.expires_at\"",
    },
    Field {
        table: Table::Rule,
        name: "keep_ttl",
        kind: Kind::Flag,
        default: Fallback::Value("false"),
        meaning: "Writing a key leaves the TTL that it has, whoever gave it.",
        needs: &["key"],
        limits: "Not together with `ttl` or `expire_at`.",
        example: "true",
    },
    Field {
        table: Table::Rule,
        name: "columns",
        kind: Kind::Columns,
        default: Fallback::Absent,
        meaning: "The columns in the value, in this order; `[\"*\"]` is every published column.",
        needs: &["key"],
        limits: "",
        example: "[\"id\", \"name\", \"price\"]",
    },
    Field {
        table: Table::Rule,
        name: "rename",
        kind: Kind::Pairs,
        default: Fallback::Absent,
        meaning: "Columns that get another name in the value: `rename = { column = \"field\" }`.",
        needs: &["key"],
        limits: "Names only columns among `columns`.",
        example: "{ name = \"title\" }",
    },
    Field {
        table: Table::Rule,
        name: "strings",
        kind: Kind::Columns,
        default: Fallback::Absent,
        meaning: "Columns that become JSON strings: decimals that must keep their digits, bigint for JavaScript.",
        needs: &["key"],
        limits: "Names only columns among `columns`.",
        example: "[\"price\"]",
    },
    Field {
        table: Table::Rule,
        name: "ttl",
        kind: TTL,
        default: Fallback::Value("\"off\""),
        meaning: TTL_MEANING,
        needs: &["key"],
        limits: "",
        example: "\"1d\"",
    },
    Field {
        table: Table::Rule,
        name: "jitter",
        kind: Kind::Share,
        default: Fallback::Value("\"0%\""),
        meaning: JITTER_MEANING,
        needs: &["key"],
        limits: "Needs a `ttl`, here or in [defaults].",
        example: "\"10%\"",
    },
    Field {
        table: Table::Rule,
        name: "every",
        kind: EVERY,
        default: Fallback::Value("\"off\""),
        meaning: EVERY_MEANING,
        needs: &["key"],
        limits: "Needs a `ttl`, here or in [defaults], and is shorter. Not with `warm = false`.",
        example: "\"12h\"",
    },
    Field {
        table: Table::Rule,
        name: "write",
        kind: WRITE,
        default: Fallback::Value("\"always\""),
        meaning: WRITE_MEANING,
        needs: &["key"],
        limits: "",
        example: "\"present\"",
    },
    Field {
        table: Table::Rule,
        name: "on_delete",
        kind: ON_DELETE,
        default: Fallback::Value("\"delete\""),
        meaning: ON_DELETE_MEANING,
        needs: &["key"],
        limits: "`\"keep\"` wants a `ttl`, or the key stays for ever.",
        example: "\"keep\"",
    },
    Field {
        table: Table::Rule,
        name: "warm",
        kind: Kind::Flag,
        default: Fallback::Value("true"),
        meaning: WARM_MEANING,
        needs: &["key"],
        limits: "",
        example: "false",
    },
    Field {
        table: Table::Rule,
        name: "audit",
        kind: Kind::SharePerMinute,
        default: Fallback::Value("\"off\""),
        meaning: AUDIT_MEANING,
        needs: &["key"],
        limits: "",
        example: "\"0.1%/min\"",
    },
    Field {
        table: Table::Rule,
        name: "owns",
        kind: Kind::Flag,
        default: Fallback::Value("false"),
        meaning: "Nobody else makes keys that `key` can make. Keys that no row has are searched for and deleted where \
                  columns of a known form (numbers, UUIDs, times) or digests fill the template; where a text could be \
                  anything, as in `user:{name}`, only with `owns = true`.",
        needs: &["key"],
        limits: "",
        example: "true",
    },
    Field {
        table: Table::Rule,
        name: "tags",
        kind: Kind::Templates,
        default: Fallback::Absent,
        meaning: "Tags of the key: it is a member of the set `tag:…`, its name without the prefix, as long as its row counts, \
                  whether it is cached or not. Applications add keys of their own in the same way. A column that is NULL is \
                  no tag.",
        needs: &["key"],
        limits: "Needs `write = \"present\"`: a key that must be there cannot go with a tag.",
        example: "[\"category:{category_id}\"]",
    },
    Field {
        table: Table::Rule,
        name: "delete",
        kind: Kind::Templates,
        default: Fallback::Absent,
        meaning: "Keys that a change makes stale; they are deleted. Templates as in `key`, filled from the old and \
                  from the new row.",
        needs: &[],
        limits: "",
        example: "[\"products:cat:{category_id}\", \"feed:global\"]",
    },
    Field {
        table: Table::Rule,
        name: "redelete",
        kind: Kind::ChoiceOrDuration { choices: &["settled", "off"], min: SECOND, max: Duration::from_secs(60) },
        default: Fallback::Value("\"settled\""),
        meaning: "Whoever fills a deleted key at once can still read the old row. With `\"settled\"` the keys of `delete` are \
                  deleted again once everybody sees the change; mostly it is visible the first time. With a duration, so are \
                  they, and so long after that everything that `delete`, `delete_tags` and `delete_match` name once more: for \
                  those that take a while to fill. Until then Postgres keeps the change's log. Where more goes stale than may \
                  wait (16,384 keys or tags, 1 MiB of their names, 256 patterns), everything that such rules can name goes instead.",
        needs: &[],
        limits: "Needs `delete`, `delete_tags` or `delete_match`. No duration together with `lookup`.",
        example: "\"30s\"",
    },
    Field {
        table: Table::Rule,
        name: "delete_tags",
        kind: Kind::Templates,
        default: Fallback::Absent,
        meaning: "Tags that a change makes stale: once it is visible, every key that is a member of the set `tag:…` is deleted, \
                  and the set too, but for members that a rule's `tags` put there. Keys that a rule must hold stay.",
        needs: &[],
        limits: "",
        example: "[\"category:{category_id}\"]",
    },
    Field {
        table: Table::Rule,
        name: "delete_match",
        kind: Kind::Templates,
        default: Fallback::Absent,
        meaning: "Patterns of keys that a change makes stale: `*` matches anything, placeholders as in `delete` stand for \
                  themselves. All keys under the prefix are gone through once for all changes that wait; prefer `bump` where \
                  there are many keys.",
        needs: &[],
        limits: "",
        example: "[\"products_list:{category_id}:*\"]",
    },
    Field {
        table: Table::Rule,
        name: "bump",
        kind: Kind::Templates,
        default: Fallback::Absent,
        meaning: "Keys that get a new generation, which applications put into the names of their keys. It never comes twice.",
        needs: &[],
        limits: "",
        example: "[\"gen:products\"]",
    },
    Field {
        table: Table::Rule,
        name: "lookup",
        kind: Kind::Text,
        default: Fallback::Absent,
        meaning: "A query for what keys need of other tables. `:column` stands for a column of the changed row, old and new; \
                  the templates use the columns of the result beside those of the row, and each row of it names keys. It \
                  runs once the change is visible. With more than 1000 rows, if it fails for ten seconds, or where all that is to \
                  be looked up at a time takes half a minute, everything that those templates can have made goes.",
        needs: &[],
        limits: "Needs `delete`, `delete_tags`, `delete_match` or `bump`; not together with `key`. What changes in the \
                 tables that it reads is a matter of other rules.",
        example: "\"select code as dept from public.departments where id = :department_id\"",
    },
    Field {
        table: Table::Rule,
        name: "stream",
        kind: Kind::Section,
        default: Fallback::Absent,
        meaning: "Each change becomes an entry of a Redis stream.",
        needs: &[],
        limits: "",
        example: "{ key = \"orders\", maxlen = 100000, ops = [\"insert\", \"update\"] }",
    },
    Field {
        table: Table::Rule,
        name: "publish",
        kind: Kind::Section,
        default: Fallback::Absent,
        meaning: "Each change is published on a channel.",
        needs: &[],
        limits: "",
        example: "{ channel = \"orders:{customer_id}\" }",
    },
    Field {
        table: Table::Stream,
        name: "key",
        kind: Kind::Template,
        default: Fallback::Required,
        meaning: "The stream.",
        needs: &[],
        limits: "",
        example: "\"orders\"",
    },
    Field {
        table: Table::Stream,
        name: "maxlen",
        kind: Kind::Count { min: 1, max: 1_000_000_000 },
        default: Fallback::Absent,
        meaning: "About how many entries it keeps; without it, all.",
        needs: &[],
        limits: "",
        example: "100000",
    },
    Field {
        table: Table::Stream,
        name: "ops",
        kind: Kind::Choices(&["insert", "update", "delete"]),
        default: Fallback::Value("[\"insert\", \"update\", \"delete\"]"),
        meaning: "The changes that become entries. TRUNCATE counts where `delete` does.",
        needs: &[],
        limits: "",
        example: "[\"insert\", \"update\"]",
    },
    Field {
        table: Table::Publish,
        name: "channel",
        kind: Kind::Template,
        default: Fallback::Required,
        meaning: "The channel, prefix included. A row that changes it is published on both.",
        needs: &[],
        limits: "",
        example: "\"orders:{customer_id}\"",
    },
    Field {
        table: Table::Rule,
        name: "changed",
        kind: Kind::Columns,
        default: Fallback::Absent,
        meaning: "An UPDATE counts only if one of these columns changed, or one that the rule's own templates use.",
        needs: &[],
        limits: "Needs `\"update\"` among `on`.",
        example: "[\"name\", \"price\"]",
    },
    Field {
        table: Table::Query,
        name: "key",
        kind: Kind::Template,
        default: Fallback::Required,
        meaning: "The key. Its placeholders are the query's parameters; filters and defaults are as in `key` of a rule.",
        needs: &[],
        limits: "",
        example: "\"page:category:{category_id}\"",
    },
    Field {
        table: Table::Query,
        name: "mode",
        kind: Kind::Choice(&["refresh", "delete"]),
        default: Fallback::Required,
        meaning: "What happens to a stale key: with `\"refresh\"` `sql` is run again and its result written; with `\"delete\"` it is \
                  deleted, and whoever needs it fills it.",
        needs: &[],
        limits: "`\"refresh\"` needs `sql`.",
        example: "\"refresh\"",
    },
    Field {
        table: Table::Query,
        name: "sql",
        kind: Kind::Text,
        default: Fallback::Absent,
        meaning: "What the key holds the result of: one query that only reads. `:name` is a parameter, of the type that Postgres \
                  expects there. One that fails deletes its key, and is tried again.",
        needs: &["shape"],
        limits: "Excludes `mode = \"delete\"`.",
        example: "\"select id, name from public.products where category_id = :category_id order by rank limit 20\"",
    },
    Field {
        table: Table::Query,
        name: "shape",
        kind: Kind::Choice(&["rows", "row", "value"]),
        default: Fallback::Absent,
        meaning: "What of the result is written: all rows as a JSON array, `[]` if there is none; the first row as a JSON object, or \
                  no key; or the one column of the first row as Postgres writes it as text, or no key where it is NULL. JSON is \
                  that of `row_to_json`.",
        needs: &["sql"],
        limits: "",
        example: "\"rows\"",
    },
    Field {
        table: Table::Query,
        name: "keys",
        kind: Kind::Text,
        default: Fallback::Absent,
        meaning: "A query for all keys that there should be: its columns are named after the parameters. They are written at a first \
                  start, and by `keepstep warm`; a key that is not among them is deleted. Whoever changes what it answers should stand \
                  among `on`. A key without parameters needs none.",
        needs: &["sql"],
        limits: "",
        example: "\"select id as category_id from public.categories\"",
    },
    Field {
        table: Table::Query,
        name: "every",
        kind: Kind::Duration { min: SECOND, max: TEN_YEARS, off: false },
        default: Fallback::Absent,
        meaning: "All keys are read again that often, for what time changes. Times are counted from 1970 in UTC, as in a rule.",
        needs: &["sql"],
        limits: "Needs `keys` where the key has parameters.",
        example: "\"10m\"",
    },
    Field {
        table: Table::Query,
        name: "min_interval",
        kind: Kind::Duration { min: Duration::from_millis(1), max: Duration::from_secs(600), off: false },
        default: Fallback::Absent,
        meaning: "One and the same key is not read again sooner than this after the last time, unless that failed; what changes \
                  meanwhile is one read.",
        needs: &["sql"],
        limits: "",
        example: "\"100ms\"",
    },
    Field {
        table: Table::Query,
        name: "max_keys",
        kind: Kind::Count { min: 1, max: 10_000 },
        default: Fallback::Value("1000"),
        meaning: "How many keys a `lookup` may find for one change. With more, all that the template can have made are deleted. What \
                  rows name by `params` alone is not counted.",
        needs: &[],
        limits: "",
        example: "1000",
    },
    Field {
        table: Table::Query,
        name: "ttl",
        kind: Kind::Duration { min: Duration::from_millis(100), max: TEN_YEARS, off: false },
        default: Fallback::Absent,
        meaning: "How long a key lives after it was written; without it, until it is deleted.",
        needs: &["sql"],
        limits: "",
        example: "\"1h\"",
    },
    Field {
        table: Table::Query,
        name: "jitter",
        kind: Kind::Share,
        default: Fallback::Absent,
        meaning: JITTER_MEANING,
        needs: &["ttl"],
        limits: "",
        example: "\"10%\"",
    },
    Field {
        table: Table::Query,
        name: "on",
        kind: Kind::Sections,
        default: Fallback::Required,
        meaning: "The tables whose rows make keys stale.",
        needs: &[],
        limits: "",
        example: "[{ table = \"public.products\", params = { category_id = \"{category_id}\" } }]",
    },
    Field {
        table: Table::On,
        name: "table",
        kind: Kind::TableName,
        default: Fallback::Required,
        meaning: "The table, as in a rule.",
        needs: &[],
        limits: "",
        example: "\"public.sellers\"",
    },
    Field {
        table: Table::On,
        name: "params",
        kind: Kind::Pairs,
        default: Fallback::Absent,
        meaning: "Parameters of the key that follow from the row, old and new: templates with its columns.",
        needs: &[],
        limits: "With `lookup` it may give the others.",
        example: "{ category_id = \"{category_id}\" }",
    },
    Field {
        table: Table::On,
        name: "changed",
        kind: Kind::Columns,
        default: Fallback::Absent,
        meaning: "An UPDATE counts only if one of these columns changed, or one that `params` or `lookup` use.",
        needs: &[],
        limits: "",
        example: "[\"name\"]",
    },
    Field {
        table: Table::On,
        name: "lookup",
        kind: Kind::Text,
        default: Fallback::Absent,
        meaning: "A query for the parameters that `params` does not give, as in a rule: its columns are named after them.",
        needs: &[],
        limits: "",
        example: "\"select distinct category_id from public.products where seller_id = :id\"",
    },
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_name_stands_once_in_a_table_and_is_not_also_a_later_one() {
        for table in Table::ALL {
            let mut names = HashSet::new();
            let all = table.fields().map(|field| field.name);
            all.for_each(|name| assert!(names.insert(name), "{name}"));
        }
    }

    #[test]
    fn defaults_are_fields_of_rules_and_mean_the_same() {
        for field in Table::Defaults.fields() {
            let of_rule = Table::Rule.field(field.name).unwrap_or_else(|| panic!("{}", field.name));
            assert_eq!((field.kind, field.default, field.meaning), (of_rule.kind, of_rule.default, of_rule.meaning));
        }
    }

    #[test]
    fn prose_is_prose() {
        for field in FIELDS {
            assert!(field.meaning.ends_with('.'), "{}", field.name);
            assert!(field.limits.is_empty() || field.limits.ends_with('.'), "{}", field.name);
        }
    }
}
