//! What can keep a rule from being bound, and how it is said.

use std::ops::Range;

use super::expression::ExpressionError;
use super::filter::Filter;
use super::key::Boundary;
use super::template::Template;
use crate::catalog::{Carrier, HiddenColumn, sql_identifier, sql_table};
use crate::config::code::Code;
use crate::config::diagnostic::Diagnostic;
use crate::config::{Operations, Rule, Spanned, TableName};
use crate::model::ReplicaIdentity;

/// At most so many names are listed in a message.
const NAMES_SHOWN: usize = 20;
/// At most so many tables are listed in a message, with a statement for each.
const STATEMENTS_SHOWN: usize = 3;

/// A rule and a relation do not fit together. Spans are bytes of the rules file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BindProblem {
    /// The table has no such column.
    UnknownColumn {
        /// Where the rule names it.
        span: Range<usize>,
        /// The name.
        column: String,
        /// The column that was probably meant.
        near: Option<String>,
        /// The columns there are.
        columns: Vec<String>,
    },
    /// The table has the column, but the publication leaves it out.
    HiddenColumn {
        /// Where the rule names it.
        span: Range<usize>,
        /// The column.
        column: HiddenColumn,
        /// What leaves it out.
        carrier: Box<Carrier>,
        /// The columns that are published.
        published: Vec<String>,
        /// The row filter that the table is published with.
        row_filter: Option<String>,
    },
    /// `{_pk}` of a table without a primary key.
    NoPrimaryKey {
        /// Where it stands.
        span: Range<usize>,
    },
    /// One of `vars` uses another one.
    NestedVar {
        /// Where it does.
        span: Range<usize>,
        /// The one it uses.
        var: String,
    },
    /// The rule follows UPDATE or DELETE, and the log holds nothing of the old row.
    NoIdentity {
        /// What the table says.
        identity: ReplicaIdentity,
        /// What would help.
        remedy: IdentityRemedy,
    },
    /// The replica identity has columns that the publication leaves out, so Postgres refuses UPDATE and DELETE.
    HiddenIdentity {
        /// Those columns.
        columns: Vec<String>,
        /// Whether generated columns are among them.
        generated: bool,
        /// The publication.
        publication: String,
    },
    /// A key uses columns that the log does not hold of the old row.
    NotInIdentity {
        /// Where the key uses them.
        span: Range<usize>,
        /// Those columns.
        columns: Vec<String>,
        /// What the table says.
        identity: ReplicaIdentity,
        /// The columns that the log does hold.
        sent: Vec<String>,
        /// What would help.
        remedy: IdentityRemedy,
    },
    /// The log holds less of the rows of some partitions than the root's replica identity says.
    WeakLeaves {
        /// What the root says.
        identity: ReplicaIdentity,
        /// Those partitions.
        leaves: Vec<TableName>,
    },
    /// Two rows of the table can have the same key.
    SharedKey {
        /// Where the key loses what tells them apart.
        span: Range<usize>,
        /// How.
        how: Sharing,
    },
    /// Two results of a query can have the same key.
    SharedResult {
        /// Where the key loses what tells them apart.
        span: Range<usize>,
        /// How.
        boundary: Boundary,
    },
    /// A key can be one of keepstep's own.
    ReservedKey {
        /// The template.
        span: Range<usize>,
        /// Such a key.
        key: Vec<u8>,
    },
    /// Two columns would go into the same field.
    DuplicateField {
        /// Where it gets its second one.
        span: Range<usize>,
        /// The field.
        field: String,
    },
    /// No template uses what is looked up.
    IdleLookup {
        /// The query.
        span: Range<usize>,
    },
    /// An expression does not fit the table.
    Expression {
        /// Where.
        span: Range<usize>,
        /// Why.
        error: ExpressionError,
    },
}

/// How the log can be made to hold more of a table's old rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdentityRemedy {
    /// A unique index that can be the replica identity and holds what is needed.
    pub index: Option<String>,
    /// Each partition has a replica identity of its own to be changed.
    pub partitioned: bool,
}

/// How two rows come to the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// The key holds the columns of no unique index.
    NotUnique {
        /// The columns it holds.
        used: Vec<String>,
        /// The columns of each unique index.
        unique: Vec<Vec<String>>,
    },
    /// It holds them, but a filter maps different values to the same.
    Filter {
        /// The filter.
        filter: Filter,
    },
    /// It holds them, but a default looks like a value.
    Default,
    /// It holds them, but where one ends and the next begins depends on the reading.
    Boundary(Boundary),
}

impl BindProblem {
    /// The problem as it is shown; `rule` is the one that was bound.
    pub fn diagnostic(&self, rule: &Rule) -> Diagnostic {
        let name = &rule.name.value;
        let table = &rule.table.value;
        match self {
            Self::UnknownColumn { span, column, near, columns } => {
                let title = format!("rule `{name}` uses column `{column}`, which {table} does not have");
                let help = match near {
                    Some(near) => format!("did you mean `{near}`?"),
                    None => format!("its columns are {}", listed(columns, NAMES_SHOWN)),
                };
                Diagnostic::error(Code::UnknownColumn, title, span.clone(), "no such column").help(help)
            }
            Self::HiddenColumn { span, column, carrier, published, row_filter } => {
                let filter = row_filter.as_deref();
                hidden_column(rule, span, column, carrier, published, filter)
            }
            Self::NoPrimaryKey { span } => {
                let title = format!("rule `{name}` uses {{_pk}}, and {table} has no primary key");
                let found = Diagnostic::error(Code::NoPrimaryKey, title, span.clone(), "stands for nothing");
                let key = format!("ALTER TABLE {} ADD PRIMARY KEY (…);", sql_table(table));
                found.help("name the columns that tell its rows apart").help(format!("or give it one:  {key}"))
            }
            Self::NestedVar { span, var } => {
                let title = format!("a var of rule `{name}` uses the var `{var}`; vars can use columns only");
                Diagnostic::error(Code::NestedVar, title, span.clone(), "this is a var")
                    .help(format!("write out what `{var}` stands for"))
            }
            Self::NoIdentity { identity, remedy } => no_identity(rule, *identity, remedy),
            Self::HiddenIdentity { columns, generated, publication } => {
                hidden_identity(rule, columns, *generated, publication)
            }
            Self::NotInIdentity { span, columns, identity, sent, remedy } => {
                not_in_identity(rule, span, columns, *identity, sent, remedy)
            }
            Self::WeakLeaves { identity, leaves } => weak_leaves(rule, *identity, leaves),
            Self::SharedKey { span, how } => shared_key(rule, span, how),
            Self::SharedResult { span, boundary } => shared_result(rule, span, boundary),
            Self::ReservedKey { span, key } => {
                let title = format!("rule `{name}` can make keys that are keepstep's own");
                let label = format!("can make `{}`", String::from_utf8_lossy(key));
                Diagnostic::error(Code::ReservedKey, title, span.clone(), label)
                    .help("begin the key with another literal")
            }
            Self::DuplicateField { span, field } => {
                let title = format!("rule `{name}` puts two columns into the field `{field}`");
                Diagnostic::error(Code::SameField, title, span.clone(), "the second one")
                    .help("give each field a name of its own in `rename`")
            }
            Self::IdleLookup { span } => {
                let title = format!("rule `{name}` looks up what none of its templates uses");
                Diagnostic::error(Code::Lookup, title, span.clone(), "no template uses a column of the result")
                    .help("name one in `delete`, `delete_match` or `bump`, or leave `lookup` out")
            }
            Self::Expression { span, error } => {
                let title = format!("rule `{name}`: the expression {}", error.problem);
                let problem = Diagnostic::error(Code::ExpressionType, title, span.clone(), error.label.clone());
                error.help.iter().fold(problem, |problem, help| problem.help(help.clone()))
            }
        }
    }
}

fn hidden_column(
    rule: &Rule,
    span: &Range<usize>,
    column: &HiddenColumn,
    carrier: &Carrier,
    published: &[String],
    row_filter: Option<&str>,
) -> Diagnostic {
    let (name, table, hidden) = (&rule.name.value, &rule.table.value, &column.name);
    let title = format!("rule `{name}` uses column `{hidden}` of {table}, which {carrier} leaves out");
    let publication = match (carrier, column.generated) {
        (Carrier::Publication(publication), _) => publication,
        (Carrier::Outbox(_), true) => {
            return Diagnostic::error(Code::UnpublishedColumn, title, span.clone(), "a generated column, never stored")
                .help("use the columns that it is generated from");
        }
        (Carrier::Outbox(_), false) => {
            return Diagnostic::error(Code::UnpublishedColumn, title, span.clone(), "not stored")
                .help("let keepstep store it as well:  keepstep setup");
        }
    };
    if column.generated {
        return Diagnostic::error(Code::UnpublishedColumn, title, span.clone(), "a generated column, never sent")
            .help(publish_generated(publication));
    }
    let columns = [published, std::slice::from_ref(hidden)].concat();
    let help = format!("publish it as well:  {}", republish(&rule.table.value, publication, &columns, row_filter));
    Diagnostic::error(Code::UnpublishedColumn, title, span.clone(), "not in the publication's column list, never sent")
        .help(help)
}

fn hidden_identity(rule: &Rule, columns: &[String], generated: bool, publication: &str) -> Diagnostic {
    let (name, table) = (&rule.name.value, &rule.table.value);
    let title = format!("Postgres refuses every UPDATE and DELETE of {table}, which rule `{name}` follows");
    let hidden = parenthesised(columns);
    let label = format!("publication `{publication}` leaves out {hidden}, part of the replica identity");
    let help = if generated {
        publish_generated(publication)
    } else {
        format!("publish every column:  {}", republish(table, publication, &[], None))
    };
    Diagnostic::error(Code::HiddenIdentity, title, rule.table.span.clone(), label).help(help)
}

/// Virtual ones are never sent.
fn publish_generated(publication: &str) -> String {
    let publication = sql_identifier(publication);
    format!(
        "from Postgres 18 on stored generated columns can be published:  \
         ALTER PUBLICATION {publication} SET (publish_generated_columns = stored);"
    )
}

fn no_identity(rule: &Rule, identity: ReplicaIdentity, remedy: &IdentityRemedy) -> Diagnostic {
    let (name, table) = (&rule.name.value, &rule.table.value);
    let followed = operations(Operations { insert: false, ..rule.on }, ["INSERT", "UPDATE", "DELETE"]).join(" and ");
    let title = format!("rule `{name}` follows {followed} of {table}, but the table has no replica identity");
    let lack = match identity {
        ReplicaIdentity::Default => "no primary key (a deferrable one does not count)",
        ReplicaIdentity::Index => "REPLICA IDENTITY USING INDEX, but the index is gone",
        ReplicaIdentity::Nothing | ReplicaIdentity::Full => "REPLICA IDENTITY NOTHING",
    };
    let label = format!("{lack}: Postgres refuses UPDATE and DELETE of such a table once it is published");
    let mut found = Diagnostic::error(Code::NoReplicaIdentity, title, rule.table.span.clone(), label);
    if identity == ReplicaIdentity::Default && remedy.index.is_none() {
        found = found.help(format!("give it a primary key:  ALTER TABLE {} ADD PRIMARY KEY (…);", sql_table(table)));
    }
    found.help.extend(remedy_help(table, remedy, "make Postgres log the old row"));
    found
}

fn not_in_identity(
    rule: &Rule,
    span: &Range<usize>,
    columns: &[String],
    identity: ReplicaIdentity,
    sent: &[String],
    remedy: &IdentityRemedy,
) -> Diagnostic {
    let noun = if columns.len() == 1 { "column" } else { "columns" };
    let title = format!(
        "rule `{}` needs {noun} {} on DELETE, but Postgres will not send {}",
        rule.name.value,
        listed(columns, NAMES_SHOWN),
        if columns.len() == 1 { "it" } else { "them" },
    );
    let kept = match identity {
        ReplicaIdentity::Index => "USING INDEX",
        _ => "DEFAULT",
    };
    let context = format!("REPLICA IDENTITY {kept}: only {} is sent for the old row", parenthesised(sent));
    let mut found =
        Diagnostic::error(Code::NotInIdentity, title, span.clone(), "not part of the table's replica identity")
            .context(rule.table.span.clone(), context);
    found.help.extend(remedy_help(&rule.table.value, remedy, "make Postgres log the old row"));
    let rest = operations(Operations { delete: false, ..rule.on }, ["\"insert\"", "\"update\"", "\"delete\""]);
    if !rest.is_empty() {
        found = found.help(format!("or limit the rule to what it can do:  on = [{}]", rest.join(", ")));
    }
    found
}

fn weak_leaves(rule: &Rule, identity: ReplicaIdentity, leaves: &[TableName]) -> Diagnostic {
    let (name, table) = (&rule.name.value, &rule.table.value);
    let title = format!("rule `{name}` cannot rely on the old rows of {table}: its partitions log less than it says");
    let says = match identity {
        ReplicaIdentity::Full => "REPLICA IDENTITY FULL, which its partitions do not inherit",
        _ => "the replica identity that counts is each partition's own",
    };
    let names: Vec<String> = leaves.iter().map(ToString::to_string).collect();
    let label = format!("{says}; less is logged by {}", listed(&names, STATEMENTS_SHOWN));
    let found = Diagnostic::error(Code::WeakPartitions, title, rule.table.span.clone(), label);
    if leaves.len() > STATEMENTS_SHOWN {
        return found.help(full_everywhere(table, "make Postgres log the old rows"));
    }
    let statements: Vec<String> =
        leaves.iter().map(|leaf| format!("ALTER TABLE {} REPLICA IDENTITY FULL;", sql_table(leaf))).collect();
    found.help(format!("make Postgres log the old rows:  {}", statements.join(" ")))
}

fn shared_key(rule: &Rule, span: &Range<usize>, how: &Sharing) -> Diagnostic {
    let (name, table) = (&rule.name.value, &rule.table.value);
    let title = format!("rule `{name}` can give two rows of {table} the same key, so one would overwrite the other");
    let key = rule.write.as_ref().map(|write| write.key.value.text()).unwrap_or_default();
    let placeholder = key_placeholder(rule.write.as_ref().map(|write| &write.key), span);
    let invalidate = format!("or let the rows make the key stale instead of writing it:  delete = [\"{key}\"]");
    let found = match how {
        Sharing::NotUnique { used, unique } => not_unique(rule, span, title, used, unique),
        Sharing::Filter { filter } => {
            let label = format!("`{}` makes different values equal", filter.name());
            let plain = placeholder.replace(&format!("|{}", filter.name()), "");
            Diagnostic::error(Code::SharedKey, title, span.clone(), label)
                .help(format!("leave the filter out: {plain}"))
        }
        Sharing::Default => {
            Diagnostic::error(Code::SharedKey, title, span.clone(), "a NULL and a value can look the same")
                .help("leave the default out: a row with a NULL here then has no key")
        }
        Sharing::Boundary(boundary) => unclear(Code::SharedKey, title, span, &placeholder, boundary),
    };
    found.help(invalidate)
}

fn shared_result(rule: &Rule, span: &Range<usize>, boundary: &Boundary) -> Diagnostic {
    let query = rule.refresh.as_ref();
    let name = query.map_or(&rule.name.value, |query| &query.name.value);
    let title = format!("query `{name}` can give two results the same key, so one would overwrite the other");
    unclear(Code::QueryKey, title, span, &key_placeholder(query.map(|query| &query.key), span), boundary)
}

fn unclear(code: Code, title: String, span: &Range<usize>, placeholder: &str, boundary: &Boundary) -> Diagnostic {
    let key = String::from_utf8_lossy(&boundary.key);
    let label = format!("where this value ends is not clear: `{key}` can be read in two ways");
    Diagnostic::error(code, title, span.clone(), label).help(match boundary.encoding_helps {
        true => {
            let encoded = placeholder.replace('}', "|urlencode}");
            format!("keep the value from looking like what stands next to it: {encoded}")
        }
        false => "put a literal between the values that neither of them can hold".to_owned(),
    })
}

fn not_unique(rule: &Rule, span: &Range<usize>, title: String, used: &[String], unique: &[Vec<String>]) -> Diagnostic {
    let key = rule.write.as_ref().map(|write| write.key.value.text()).unwrap_or_default();
    let Some(narrowest) = unique.first() else {
        let found = Diagnostic::error(Code::SharedKey, title, span.clone(), "names no single row")
            .context(rule.table.span.clone(), "no unique index that holds for all rows at all times");
        return match used {
            [] => found,
            used => {
                let columns: Vec<String> =
                    used.iter().map(|column| format!("\"{}\"", column.replace('"', "\"\""))).collect();
                let table = sql_table(&rule.table.value);
                found.help(format!(
                    "if no two rows agree in it, say so:  ALTER TABLE {table} ADD UNIQUE ({});",
                    columns.join(", ")
                ))
            }
        };
    };
    let indexes: Vec<String> = unique.iter().take(NAMES_SHOWN).map(|columns| parenthesised(columns)).collect();
    let missing = narrowest.iter().filter(|column| !used.contains(column));
    let longer: String = missing.map(|column| format!(":{{{column}}}")).collect();
    Diagnostic::error(Code::SharedKey, title, span.clone(), "holds the columns of no unique index")
        .context(rule.table.span.clone(), format!("unique: {}", indexes.join(", ")))
        .help(format!("name the row:  key = \"{key}{longer}\""))
}

/// The text of the key's placeholder at `span`, `{…}` where it cannot be told (escapes in the string).
fn key_placeholder(key: Option<&Spanned<Template>>, span: &Range<usize>) -> String {
    let found = key.and_then(|key| {
        let text = key.value.text();
        let start = span.start.checked_sub(key.span.start + 1)?;
        text.get(start..start + span.len()).filter(|part| part.starts_with('{'))
    });
    found.unwrap_or("{…}").to_owned()
}

/// The statements that give a table a wider replica identity: the narrower way first.
fn remedy_help(table: &TableName, remedy: &IdentityRemedy, why: &str) -> Vec<String> {
    let sql = sql_table(table);
    if remedy.partitioned {
        return vec![full_everywhere(table, why)];
    }
    let full = |lead: &str| format!("{lead}:  ALTER TABLE {sql} REPLICA IDENTITY FULL;");
    match &remedy.index {
        None => vec![full(why)],
        Some(index) => {
            let index = sql_identifier(index);
            let narrow = format!("{why} as far as needed:  ALTER TABLE {sql} REPLICA IDENTITY USING INDEX {index};");
            vec![narrow, full("or all of it")]
        }
    }
}

/// A partitioned table and its partitions, which do not follow it, in one psql command.
fn full_everywhere(table: &TableName, why: &str) -> String {
    let root = sql_table(table).replace('\'', "''");
    format!(
        "{why}, with psql:  SELECT format('ALTER TABLE %s REPLICA IDENTITY FULL', relid::regclass) \
         FROM pg_partition_tree('{root}') \\gexec"
    )
}

/// The statements that publish a table with other columns (all where there are none); other tables stay as they are.
fn republish(table: &TableName, publication: &str, columns: &[String], row_filter: Option<&str>) -> String {
    let (publication, table) = (sql_identifier(publication), sql_table(table));
    let quoted: Vec<String> = columns.iter().map(|column| format!("\"{}\"", column.replace('"', "\"\""))).collect();
    let list = if columns.is_empty() { String::new() } else { format!(" ({})", quoted.join(", ")) };
    let filter = row_filter.map(|filter| format!(" WHERE {filter}")).unwrap_or_default();
    format!(
        "BEGIN; ALTER PUBLICATION {publication} DROP TABLE {table}; \
         ALTER PUBLICATION {publication} ADD TABLE {table}{list}{filter}; COMMIT;"
    )
}

/// The names of the operations that are set, given those of INSERT, UPDATE and DELETE.
fn operations(on: Operations, names: [&'static str; 3]) -> Vec<&'static str> {
    let set = [on.insert, on.update, on.delete];
    names.into_iter().zip(set).filter(|(_, set)| *set).map(|(name, _)| name).collect()
}

/// `a`, `b` and more
fn listed(names: &[String], limit: usize) -> String {
    let shown: Vec<String> = names.iter().take(limit).map(|name| format!("`{name}`")).collect();
    let rest = names.len() - shown.len();
    if rest == 0 { shown.join(", ") } else { format!("{} and {rest} more", shown.join(", ")) }
}

/// (a, b)
fn parenthesised(names: &[String]) -> String {
    format!("({})", names.join(", "))
}
