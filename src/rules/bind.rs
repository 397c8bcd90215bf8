//! Rule + relation → [`BoundRule`]: column names become places in the tuple, and what Postgres will not send is found.
//!
//! A rule is bound at start, against the catalog, and again at each Relation message, against the relation as it was at
//! that moment of the log. Both find the same problems:
//!
//! - a name that is no published column;
//! - a key that cannot be rendered from the old row, because its columns are not in the replica identity: the key of
//!   a deleted row would stay for ever;
//! - a written key that two rows of the table can share: each would overwrite the other. The key must hold the columns
//!   of a unique index, and they must be told from it (see [`crate::rules::pattern`]);
//! - a key that could be one of keepstep's own.
//!
//! At start every problem is an error. While running, a table can lose a column that only the value or `changed`
//! needs: then the rule's keys can still be named, and [`Unbound::fallback`] deletes them (I9). Everything else pauses
//! the rule.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::form::{KeyForm, Piece, Source};
use super::key::{Column, Lost};
use super::pattern::Pattern;
use super::template::{Part, Placeholder, RESERVED, Template, place};
use crate::catalog::{Published, TableFacts, TableKind, UniqueIndex};
use crate::config::{ColumnSelection, Operations, Rule, Spanned, WriteAction};
use crate::decode::types::{JsonType, Types};
use crate::model::Relation;
use crate::suggest::nearest;

pub use super::key::{BoundKey, Rendered};
pub use super::problem::{BindProblem, IdentityRemedy, Sharing};

/// A rule, ready for the changes of one relation.
#[derive(Clone, Debug)]
pub struct BoundRule {
    /// Its place in [`crate::config::Config::rules`].
    pub rule: u16,
    /// The operations that count.
    pub on: Operations,
    /// Write-through, if the rule has it.
    pub write: Option<BoundWrite>,
    /// The keys that a change makes stale.
    pub delete: Vec<BoundKey>,
    /// The places of the columns of which one must have changed for an UPDATE to count; `None` is any. Those of the
    /// rule's own templates are among them.
    pub changed: Option<Vec<usize>>,
}

impl BoundRule {
    /// What each of its key templates, written and deleted ones, can make.
    pub fn forms(&self) -> Vec<KeyForm> {
        let keys = self.write.iter().map(|write| &write.key).chain(&self.delete);
        keys.map(|key| key.form.clone()).collect()
    }
}

/// Write-through, ready.
#[derive(Clone, Debug)]
pub struct BoundWrite {
    /// The key.
    pub key: BoundKey,
    /// The value; `None` while a column it needs is missing: the key is deleted instead (I9).
    pub json: Option<Vec<JsonField>>,
    /// The time to live and its jitter as a share.
    pub ttl: Option<(Duration, f64)>,
    /// Only keys that exist are refreshed.
    pub present_only: bool,
    /// A deleted row's key stays.
    pub keep_on_delete: bool,
    /// The rule's `owns`.
    pub owns: bool,
}

impl BoundWrite {
    /// Whether every key that the template can have made is the rule's own, so that one without a row may be searched for
    /// and deleted.
    pub fn is_owner(&self) -> bool {
        self.owns || self.key.pattern.is_exact()
    }
}

/// One field of a JSON object.
#[derive(Clone, Debug)]
pub struct JsonField {
    /// What stands before the value: `{"id":` for the first, `,"name":` for every other, escaped.
    pub lead: Box<[u8]>,
    /// The place of the column in the tuple.
    pub column: usize,
    /// How `row_to_json` shows its type.
    pub json: Arc<JsonType>,
    /// Shown as a JSON string instead.
    pub as_string: bool,
}

/// A rule does not fit the relation.
#[derive(Clone, Debug)]
pub struct Unbound {
    /// Everything that is wrong; at least one.
    pub problems: Vec<BindProblem>,
    /// What can still be done while that is so: the rule with its value and its `changed` left out as far as their
    /// columns are missing. `None` where the keys themselves cannot be kept right.
    pub fallback: Option<Box<BoundRule>>,
}

/// Binds a rule to a relation; `prefix` is that of `[redis]`.
///
/// `facts` are what the catalog says of the table now; `None` for a relation that the catalog no longer has, about
/// which nothing but the names can be checked.
///
/// # Errors
/// Every problem at once.
pub fn bind(
    rule: &Rule,
    rule_index: u16,
    relation: &Relation,
    facts: Option<&TableFacts>,
    types: &Types,
    prefix: &str,
) -> Result<BoundRule, Unbound> {
    let scope = Scope { rule, relation, facts, types, prefix };
    let (mut problems, mut lossy) = (Vec::new(), Vec::new());
    scope.check_identity(&mut problems);
    let key = rule.write.as_ref().and_then(|write| scope.key(&write.key, &mut problems));
    let delete: Vec<_> = rule.delete.iter().filter_map(|template| scope.key(template, &mut problems)).collect();
    if let (Some(write), Some(key)) = (&rule.write, &key) {
        problems.extend(scope.shared_key(&write.key, key));
    }
    let keys = key.iter().chain(&delete);
    let changed = rule.changed.as_ref().and_then(|names| scope.changed(names, keys, &mut lossy));
    let write = rule.write.as_ref().zip(key).map(|(write, key)| BoundWrite {
        key,
        json: scope.json_fields(write, &mut lossy),
        ttl: write.ttl.map(|ttl| (ttl, write.jitter)),
        present_only: write.present_only,
        keep_on_delete: write.keep_on_delete,
        owns: write.owns,
    });
    let bound = BoundRule { rule: rule_index, on: rule.on, write, delete, changed };
    if problems.is_empty() && lossy.is_empty() {
        return Ok(bound);
    }
    let fallback = problems.is_empty().then(|| Box::new(bound));
    for problem in lossy {
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    Err(Unbound { problems, fallback })
}

/// What names mean while one rule is bound.
struct Scope<'a> {
    rule: &'a Rule,
    relation: &'a Relation,
    facts: Option<&'a TableFacts>,
    types: &'a Types,
    prefix: &'a str,
}

impl Scope<'_> {
    /// The place of a column; `span` is where the rule names it.
    fn column(&self, name: &str, span: Range<usize>) -> Result<usize, BindProblem> {
        self.relation.column(name).ok_or_else(|| {
            let hidden = self.facts.and_then(|facts| facts.hidden.iter().find(|column| column.name == name));
            let columns: Vec<String> = self.relation.columns.iter().map(|column| column.name.clone()).collect();
            match (hidden, self.facts) {
                (Some(hidden), Some(facts)) => BindProblem::HiddenColumn {
                    span,
                    column: hidden.clone(),
                    publication: facts.publication.clone(),
                    published: columns,
                    row_filter: facts.row_filter.clone(),
                },
                _ => BindProblem::UnknownColumn {
                    span,
                    column: name.to_owned(),
                    near: nearest(name, columns.iter().map(String::as_str)).map(str::to_owned),
                    columns,
                },
            }
        })
    }

    fn column_name(&self, place: usize) -> String {
        self.relation.columns[place].name.clone()
    }

    /// A key template bound; `None` if a problem was added that keeps it from being rendered.
    fn key(&self, template: &Spanned<Template>, problems: &mut Vec<BindProblem>) -> Option<BoundKey> {
        let pieces = self.pieces(template, true, problems)?;
        let key = BoundKey::new(self.prefix, pieces, |place| self.relation.columns[place].identity);
        if self.has_identity() && self.rule.on.delete {
            problems.extend(self.outside_identity(template, &key));
        }
        let reserved = Pattern::beginning_with(format!("{}{RESERVED}", self.prefix).as_bytes());
        if let Some(example) = key.pattern.common_key(&reserved) {
            problems.push(BindProblem::ReservedKey { span: template.span.clone(), key: example });
        }
        Some(key)
    }

    /// A template's pieces. A `var` is resolved in its place; inside of one, names are columns only.
    fn pieces(
        &self,
        template: &Spanned<Template>,
        with_vars: bool,
        problems: &mut Vec<BindProblem>,
    ) -> Option<Vec<Piece<Column>>> {
        let mut pieces = Some(Vec::new());
        for part in template.value.parts() {
            let piece = match part {
                Part::Literal(text) => Some(Piece::Literal(text.as_str().into())),
                Part::Placeholder(placeholder) => {
                    let source = self.source(template, placeholder, with_vars, problems);
                    source.map(|source| Piece::Value {
                        source,
                        default: placeholder.default.as_deref().map(Box::from),
                        filters: placeholder.filters.as_slice().into(),
                    })
                }
            };
            pieces = pieces.zip(piece).map(|(mut pieces, piece)| {
                pieces.push(piece);
                pieces
            });
        }
        pieces
    }

    fn source(
        &self,
        template: &Spanned<Template>,
        placeholder: &Placeholder,
        with_vars: bool,
        problems: &mut Vec<BindProblem>,
    ) -> Option<Source<Column>> {
        let var = self.rule.vars.iter().find(|(name, _)| name.value == placeholder.name);
        if let (Some((_, var)), true) = (var, with_vars) {
            return self.pieces(var, false, problems).map(|pieces| Source::Var(pieces.into()));
        }
        match self.column(&placeholder.name, placeholder_span(template, placeholder)) {
            Ok(place) => {
                let base = self.types.get(self.relation.columns[place].type_oid).base;
                Some(Source::Column(Column { place, base }))
            }
            Err(problem) => {
                let problem = match var {
                    Some(_) => BindProblem::NestedVar {
                        span: placeholder_span(template, placeholder),
                        var: placeholder.name.clone(),
                    },
                    None => problem,
                };
                if !problems.contains(&problem) {
                    problems.push(problem);
                }
                None
            }
        }
    }

    /// Whether old tuples hold anything.
    fn has_identity(&self) -> bool {
        self.relation.columns.iter().any(|column| column.identity)
    }

    /// What keeps the rule from following UPDATE and DELETE at all.
    fn check_identity(&self, problems: &mut Vec<BindProblem>) {
        if !self.rule.on.update && !self.rule.on.delete {
            return;
        }
        let hidden = self.facts.map(TableFacts::hidden_identity).unwrap_or_default();
        if let (Some(facts), false) = (self.facts, hidden.is_empty()) {
            let generated = facts.hidden.iter().any(|column| column.generated && hidden.contains(&column.name));
            let publication = facts.publication.clone();
            problems.push(BindProblem::HiddenIdentity { columns: hidden, generated, publication });
        } else if !self.has_identity() {
            problems
                .push(BindProblem::NoIdentity { identity: self.relation.identity, remedy: self.identity_remedy(&[]) });
        }
        let Some(facts) = self.facts else { return };
        let weak: Vec<_> = facts.weak_leaves().map(|leaf| leaf.name.clone()).collect();
        if self.has_identity() && facts.published == Published::Directly && !weak.is_empty() {
            problems.push(BindProblem::WeakLeaves { identity: self.relation.identity, leaves: weak });
        }
    }

    /// The placeholders whose columns an old row does not carry.
    fn outside_identity(&self, template: &Spanned<Template>, key: &BoundKey) -> Vec<BindProblem> {
        let sent = || self.relation.columns.iter().filter(|column| column.identity).map(|column| column.name.clone());
        let needed: Vec<String> = key.columns().into_iter().map(|place| self.column_name(place)).collect();
        let placeholders = template.value.placeholders().zip(key.placeholder_columns());
        let missing = placeholders.filter_map(|(placeholder, mut columns)| {
            columns.retain(|place| !self.relation.columns[*place].identity);
            (!columns.is_empty()).then(|| BindProblem::NotInIdentity {
                span: placeholder_span(template, placeholder),
                columns: columns.into_iter().map(|place| self.column_name(place)).collect(),
                identity: self.relation.identity,
                sent: sent().collect(),
                remedy: self.identity_remedy(&needed),
            })
        });
        missing.collect()
    }

    /// How the table's old rows can be made to carry these columns.
    fn identity_remedy(&self, needed: &[String]) -> IdentityRemedy {
        let partitioned = self.facts.is_some_and(|facts| facts.kind == TableKind::Partitioned);
        let fits = |index: &&UniqueIndex| index.not_null && needed.iter().all(|column| index.columns.contains(column));
        // An index of the root says nothing of its leaves' identities, which are what counts.
        let index = self.facts.filter(|_| !partitioned).and_then(|facts| facts.unique.iter().find(fits));
        IdentityRemedy { index: index.map(|index| index.name.clone()), partitioned }
    }

    /// Why two rows could have this key, if they can.
    fn shared_key(&self, template: &Spanned<Template>, key: &BoundKey) -> Option<BindProblem> {
        let facts = self.facts?;
        let values = key.values();
        let named = |places: &[usize]| places.iter().map(|place| self.column_name(*place)).collect::<Vec<_>>();
        let told: Vec<String> =
            values.iter().filter(|value| value.lost.is_none()).flat_map(|value| named(&value.columns)).collect();
        let is_in =
            |columns: &[String], index: &UniqueIndex| index.columns.iter().all(|column| columns.contains(column));
        if facts.unique.iter().any(|index| is_in(&told, index)) {
            return None;
        }
        let used = named(&key.columns());
        let Some(held) = facts.unique.iter().find(|index| is_in(&used, index)) else {
            let unique = facts.unique.iter().map(|index| index.columns.clone()).collect();
            let how = Sharing::NotUnique { used, unique };
            return Some(BindProblem::SharedKey { span: template.span.clone(), how });
        };
        let lost = values.into_iter().find_map(|value| {
            let needed = named(&value.columns).iter().any(|name| held.columns.contains(name) && !told.contains(name));
            let how = match value.lost.filter(|_| needed)? {
                Lost::Filter(filter) => Sharing::Filter { filter },
                Lost::Default => Sharing::Default,
                Lost::Boundary { key, encoding_helps } => Sharing::Boundary { key, encoding_helps },
            };
            Some((value.placeholder, how))
        });
        let (placeholder, how) = lost?;
        let span = template.value.placeholders().nth(placeholder).map(|found| placeholder_span(template, found));
        Some(BindProblem::SharedKey { span: span.unwrap_or(template.span.clone()), how })
    }

    /// The places of the columns of `changed` and of the rule's own templates; `None` if one is missing, so that
    /// every UPDATE counts.
    fn changed<'k>(
        &self,
        names: &[Spanned<String>],
        keys: impl Iterator<Item = &'k BoundKey>,
        problems: &mut Vec<BindProblem>,
    ) -> Option<Vec<usize>> {
        let mut places = self.places(names, problems)?;
        places.extend(keys.flat_map(BoundKey::columns));
        places.sort_unstable();
        places.dedup();
        Some(places)
    }

    /// The places of all these columns, or `None` and a problem for each that is missing.
    fn places(&self, names: &[Spanned<String>], problems: &mut Vec<BindProblem>) -> Option<Vec<usize>> {
        let found = names.iter().map(|name| self.column(&name.value, name.span.clone()));
        let places: Vec<usize> =
            found.filter_map(|place| place.map_err(|problem| problems.push(problem)).ok()).collect();
        (places.len() == names.len()).then_some(places)
    }

    /// The fields of the JSON object; `None` if a column of it is missing.
    fn json_fields(&self, write: &WriteAction, problems: &mut Vec<BindProblem>) -> Option<Vec<JsonField>> {
        let known = problems.len();
        let columns = match &write.columns.value {
            ColumnSelection::All => (0..self.relation.columns.len()).collect(),
            ColumnSelection::Named(names) => self.places(names, problems).unwrap_or_default(),
        };
        self.places(&write.strings, problems);
        let mut taken: Vec<&str> = Vec::with_capacity(columns.len());
        let mut fields = Vec::with_capacity(columns.len());
        for column in columns {
            let name = &self.relation.columns[column].name;
            let renamed = write.rename.iter().find(|(from, _)| from.value == *name).map(|(_, to)| to);
            let field = renamed.map_or(name.as_str(), |to| to.value.as_str());
            if taken.contains(&field) {
                let span = renamed.map_or(write.columns.span.clone(), |to| to.span.clone());
                problems.push(BindProblem::DuplicateField { span, field: field.to_owned() });
            }
            taken.push(field);
            fields.push(JsonField {
                lead: field_lead(field, fields.is_empty()),
                column,
                json: self.types.get(self.relation.columns[column].type_oid).json.clone(),
                as_string: write.strings.iter().any(|string| string.value == *name),
            });
        }
        for (from, _) in &write.rename {
            problems.extend(self.column(&from.value, from.span.clone()).err());
        }
        (problems.len() == known).then_some(fields)
    }
}

/// `{"name":` or `,"name":`
fn field_lead(name: &str, first: bool) -> Box<[u8]> {
    let opening = if first { '{' } else { ',' };
    format!("{opening}{}:", serde_json::Value::from(name)).into_bytes().into()
}

/// Where the placeholder stands in the rules file.
fn placeholder_span(template: &Spanned<Template>, placeholder: &Placeholder) -> Range<usize> {
    place(&template.span, template.value.text(), &placeholder.range)
}
