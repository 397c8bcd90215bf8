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

use super::expression::{self, BoundExpression, Expression, ExpressionError, Names, Wanted};
use super::form::{KeyForm, Piece, Source};
use super::glob::BoundMatch;
use super::key::{Column, Lost};
use super::lookup::BoundLookup;
use super::pattern::Pattern;
use super::refresh::BoundRefresh;
use super::sql::Sql;
use super::template::{OF_TABLE, PRIMARY_KEY, Part, Placeholder, RESERVED, TAG, Template, place};
use crate::batch::{Form, Of};
use crate::catalog::{Published, TableFacts, TableKind, UniqueIndex};
use crate::config::{
    ColumnSelection, Life, Lifetime, Operations, Query, Redelete, RowForm, RowValue, Rule, Settled, Spanned, Value,
};
use crate::decode::types::{JsonType, Types};
use crate::model::Relation;
use crate::suggest::nearest;

pub use super::key::{BoundKey, Rendered, TEXT_BYTES_MAX};
pub use super::problem::{BindProblem, IdentityRemedy, Sharing};

/// The OID of `text`, from Postgres's `pg_type.dat`: what is looked up counts as that.
const TEXT: u32 = 25;

/// A rule, ready for the changes of one relation.
#[derive(Clone, Debug)]
pub struct BoundRule {
    /// Its place in [`crate::config::Config::rules`].
    pub rule: u16,
    /// The operations that count.
    pub on: Operations,
    /// The rows that count; `None` is all.
    pub when: Option<BoundExpression>,
    /// Write-through, if the rule has it.
    pub write: Option<BoundWrite>,
    /// The keys that a change makes stale.
    pub delete: Vec<BoundKey>,
    /// They are refreshed instead of deleted.
    pub refresh: Option<Arc<BoundRefresh>>,
    /// Whether what is deleted is deleted again.
    pub redelete: Redelete,
    /// What happens once the change is visible.
    pub settled: BoundSettled,
    /// Keys that are not known before something was looked up; then it is not in `delete` or `settled`.
    pub lookup: Option<Arc<BoundLookup>>,
    /// The places of the columns of which one must have changed for an UPDATE to count; `None` is any. Those of the
    /// rule's own templates are among them.
    pub changed: Option<Vec<usize>>,
}

impl BoundRule {
    /// Whether it does something once a change is visible, besides deleting again.
    pub fn settles(&self) -> bool {
        !self.settled.is_empty() || self.lookup.is_some() || self.refresh.is_some()
    }

    /// The places of the columns that it uses of a row, new or old, each once, in ascending order.
    pub fn columns(&self) -> Vec<usize> {
        let keys = self.delete.iter().chain(self.settled.keys()).chain(&self.settled.delete_tags);
        let mut places: Vec<usize> = keys.flat_map(BoundKey::columns).collect();
        places.extend(self.settled.delete_match.iter().flat_map(BoundMatch::columns));
        places.extend(self.settled.row.iter().flat_map(|field| field.source.columns()));
        places.extend(&self.settled.identity);
        places.extend(self.lookup.iter().flat_map(|lookup| lookup.row.iter().copied()));
        places.extend(self.when.iter().flat_map(BoundExpression::all_columns));
        places.extend(self.changed.iter().flatten());
        places.extend(self.write.iter().flat_map(BoundWrite::columns));
        places.sort_unstable();
        places.dedup();
        places
    }

    /// What each of its key templates, written and deleted ones and those of tags, can make.
    pub fn forms(&self) -> Vec<KeyForm> {
        let written = self.write.iter().flat_map(|write| std::iter::once(&write.key).chain(write.tag_keys()));
        written.chain(self.deletes()).chain(self.delete_tags()).map(|key| key.form.clone()).collect()
    }

    /// What whoever deletes by tag must know of the rule.
    pub fn tagging(&self) -> Tagging {
        let of_write = |write: &&BoundWrite| !write.present_only;
        let written = self.write.iter().filter(of_write).map(|write| &write.key).chain(self.settled.keys());
        let written = written.chain(self.deletes().filter(|_| self.refresh.is_some()));
        let tagged = self.write.iter().flat_map(|write| write.tags.iter().map(move |tag| (tag, write)));
        Tagging {
            kept: written.map(|key| key.pattern.clone()).collect(),
            registered: tagged.map(|(tag, write)| (tag.key.pattern.clone(), write.key.pattern.clone())).collect(),
        }
    }

    /// The tags that a change makes stale, whether they have to be looked up or not.
    pub fn delete_tags(&self) -> impl Iterator<Item = &BoundKey> {
        self.settled.delete_tags.iter().chain(self.lookup.iter().flat_map(|lookup| &lookup.delete_tags))
    }

    /// How long after a change is visible everything that it made stale is deleted once more.
    pub fn again_after(&self) -> Option<Duration> {
        match self.redelete {
            Redelete::After(delay) => Some(delay),
            Redelete::Off | Redelete::Settled => None,
        }
    }

    /// The templates of the keys that a change makes stale, each with its key; `rule` is the one that was bound.
    pub fn delete_templates<'b>(&'b self, rule: &'b Rule) -> Vec<(&'b Spanned<Template>, &'b BoundKey)> {
        self.paired(rule, &rule.delete, &self.delete, |lookup| &lookup.delete)
    }

    /// The same for generations.
    pub fn bump_templates<'b>(&'b self, rule: &'b Rule) -> Vec<(&'b Spanned<Template>, &'b BoundKey)> {
        self.paired(rule, &rule.settled.bump, &self.settled.bump, |lookup| &lookup.bump)
    }

    /// The same for tags that go.
    pub fn tag_templates<'b>(&'b self, rule: &'b Rule) -> Vec<(&'b Spanned<Template>, &'b BoundKey)> {
        self.paired(rule, &rule.settled.delete_tags, &self.settled.delete_tags, |lookup| &lookup.delete_tags)
    }

    /// The same for patterns.
    pub fn match_templates<'b>(&'b self, rule: &'b Rule) -> Vec<(&'b Spanned<Template>, &'b BoundMatch)> {
        self.paired(rule, &rule.settled.delete_match, &self.settled.delete_match, |lookup| &lookup.delete_match)
    }

    /// Each template with what it was bound to: the rule's `own`, or what is `behind` its lookup.
    fn paired<'b, B>(
        &'b self,
        rule: &'b Rule,
        templates: &'b [Spanned<Template>],
        own: &'b [B],
        behind: impl Fn(&'b BoundLookup) -> &'b [B],
    ) -> Vec<(&'b Spanned<Template>, &'b B)> {
        let names = self.lookup.as_ref().map_or(&[][..], |lookup| &lookup.names);
        let (mut own, mut behind) = (own.iter(), self.lookup.iter().flat_map(|lookup| behind(lookup)));
        let is_looked_up = |name: &str| names.iter().any(|known| known.value == name);
        let needs = |template: &Spanned<Template>| {
            placeholders(rule, template).any(|(_, placeholder)| is_looked_up(&placeholder.name))
        };
        let paired = templates.iter().filter_map(|template| {
            let bound = if needs(template) { behind.next() } else { own.next() };
            Some((template, bound?))
        });
        paired.collect()
    }

    /// The keys that a change makes stale, whether they have to be looked up or not.
    pub fn deletes(&self) -> impl Iterator<Item = &BoundKey> {
        self.delete.iter().chain(self.lookup.iter().flat_map(|lookup| &lookup.delete))
    }
}

/// What waits until whoever reads the tables sees the change.
#[derive(Clone, Debug, Default)]
pub struct BoundSettled {
    /// Keys that match go.
    pub delete_match: Vec<BoundMatch>,
    /// Tags that go with their keys.
    pub delete_tags: Vec<BoundKey>,
    /// Keys that get a new generation.
    pub bump: Vec<BoundKey>,
    /// An entry is added to a stream.
    pub stream: Option<BoundStream>,
    /// A message is published.
    pub publish: Option<BoundKey>,
    /// The table's columns, for what these say of rows.
    pub row: Vec<JsonField>,
    /// The places of those in the replica identity.
    pub identity: Vec<usize>,
}

impl BoundSettled {
    /// Whether there is anything to do.
    pub fn is_empty(&self) -> bool {
        self.delete_match.is_empty() && self.delete_tags.is_empty() && self.keys().next().is_none()
    }

    /// What it writes to: generations, the stream, the channel.
    pub fn keys(&self) -> impl Iterator<Item = &BoundKey> {
        self.bump.iter().chain(self.stream.iter().map(|stream| &stream.key)).chain(&self.publish)
    }
}

/// A stream of changes.
#[derive(Clone, Debug)]
pub struct BoundStream {
    /// Its key.
    pub key: BoundKey,
    /// About how many entries it keeps.
    pub maxlen: Option<u64>,
    /// The operations that are told.
    pub ops: Operations,
}

/// Write-through, ready.
#[derive(Clone, Debug)]
pub struct BoundWrite {
    /// The key.
    pub key: BoundKey,
    /// The member, where the key is a set or a sorted set.
    pub member: Option<BoundMember>,
    /// The value; `None` while a column it needs is missing: the key is deleted instead (I9).
    pub value: Option<BoundValue>,
    /// The time to live.
    pub life: BoundLife,
    /// Only keys that exist are refreshed.
    pub present_only: bool,
    /// A deleted row's key stays.
    pub keep_on_delete: bool,
    /// The rule's `owns`.
    pub owns: bool,
    /// Sets that the key is a member of as long as the row counts.
    pub tags: Vec<BoundTag>,
}

/// A member of a set.
#[derive(Clone, Debug)]
pub struct BoundMember {
    /// It, as a key without a prefix.
    pub text: BoundKey,
    /// What it is a member of.
    pub of: Of,
}

/// A tag of a written key.
#[derive(Clone, Debug)]
pub struct BoundTag {
    /// The key of the set.
    pub key: BoundKey,
    /// The written key, without the prefix.
    pub member: BoundMember,
}

/// What whoever deletes by tag must know of a rule.
#[derive(Clone, Debug, Default)]
pub struct Tagging {
    /// Keys that stay, whatever tag somebody gave them.
    pub kept: Vec<Pattern>,
    /// Tags, and the keys that stay their members: their rows say so.
    pub registered: Vec<(Pattern, Pattern)>,
}

/// What is written.
#[derive(Clone, Debug)]
pub enum BoundValue {
    /// A JSON object: as a string, or as Redis's JSON type.
    Json(Form, Vec<JsonField>),
    /// A hash.
    Hash(Vec<HashField>),
    /// A text, as a key without a prefix.
    Text(BoundKey),
    /// Nothing: a set's member says it all.
    Nothing,
    /// A sorted set's member has a score.
    Score(BoundExpression),
}

/// See [`crate::config::Life`].
#[derive(Clone, Debug)]
pub enum BoundLife {
    /// As long as its row.
    Forever,
    /// So long, shortened by a share.
    Ttl(Duration, f64),
    /// As long as the row says, shortened by a share.
    OfRow(BoundExpression, f64),
    /// Until the row says.
    Until(BoundExpression),
    /// As long as before.
    Keep,
}

impl BoundLife {
    /// No TTL is shortened.
    pub fn without_jitter(&mut self) {
        if let BoundLife::Ttl(_, jitter) | BoundLife::OfRow(_, jitter) = self {
            *jitter = 0.0;
        }
    }
}

impl BoundWrite {
    /// What names the cell, and the row: the key, and the member.
    pub fn named_by(&self) -> impl Iterator<Item = &BoundKey> {
        let text = if let Some(BoundValue::Text(text)) = &self.value { Some(text) } else { None };
        std::iter::once(&self.key).chain(self.member.as_ref().map(|member| &member.text)).chain(text)
    }

    /// The keys of its tags.
    pub fn tag_keys(&self) -> impl Iterator<Item = &BoundKey> {
        self.tags.iter().map(|tag| &tag.key)
    }

    /// The places of the columns that it uses.
    fn columns(&self) -> Vec<usize> {
        let mut places: Vec<usize> = self.named_by().chain(self.tag_keys()).flat_map(BoundKey::columns).collect();
        match &self.value {
            Some(BoundValue::Json(_, fields)) => places.extend(fields.iter().flat_map(|field| field.source.columns())),
            Some(BoundValue::Hash(fields)) => places.extend(fields.iter().flat_map(|field| field.source.columns())),
            Some(BoundValue::Score(score)) => places.extend(score.all_columns()),
            // A text is among what names it.
            Some(BoundValue::Text(_) | BoundValue::Nothing) | None => {}
        }
        if let BoundLife::OfRow(expression, _) | BoundLife::Until(expression) = &self.life {
            places.extend(expression.all_columns());
        }
        places
    }

    /// Whether every key that the template can have made is the rule's own, so that one without a row may be searched for
    /// and deleted.
    pub fn is_owner(&self) -> bool {
        self.owns || self.key.pattern.is_exact()
    }
}

/// Where a field's value comes from.
#[derive(Clone, Debug)]
pub enum FieldSource {
    /// A column: its place in the tuple, and how `row_to_json` shows its type.
    Column {
        /// Its place.
        place: usize,
        /// Its type.
        json: Arc<JsonType>,
        /// Shown as a JSON string instead.
        as_string: bool,
    },
    /// `compute`
    Computed(BoundExpression),
}

impl FieldSource {
    /// The places of the columns that it uses.
    fn columns(&self) -> Vec<usize> {
        match self {
            FieldSource::Column { place, .. } => vec![*place],
            FieldSource::Computed(expression) => expression.all_columns(),
        }
    }
}

/// One field of a JSON object.
#[derive(Clone, Debug)]
pub struct JsonField {
    /// What stands before the value: `{"id":` for the first, `,"name":` for every other, escaped.
    pub lead: Box<[u8]>,
    /// Its value.
    pub source: FieldSource,
}

/// One field of a hash.
#[derive(Clone, Debug)]
pub struct HashField {
    /// Its name.
    pub name: Box<[u8]>,
    /// Its value.
    pub source: FieldSource,
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
    let looked_up = looked_up(rule, relation);
    let scope = Scope { rule, relation, facts, types, prefix, looked_up: &[] };
    let wide = Scope { looked_up: &looked_up, ..scope };
    let (mut problems, mut lossy) = (Vec::new(), Vec::new());
    scope.check_identity(&mut problems);
    let key = rule.write.as_ref().and_then(|write| scope.key(&write.key, &mut problems));
    let member = rule.write.as_ref().and_then(|write| scope.member(&write.value, &mut problems));
    let tags = rule.write.iter().flat_map(|write| write.tags.iter().map(move |tag| (write, tag)));
    let tags = tags.filter_map(|(write, tag)| scope.written_tag(&write.key, tag, &mut problems)).collect();
    let delete: Vec<_> = rule.delete.iter().filter_map(|template| wide.key(template, &mut problems)).collect();
    if let (Some(write), Some(key)) = (&rule.write, &key) {
        problems.extend(scope.shared_key(&write.key, key, member.as_ref()));
    }
    let when = scope.expression(rule.when.as_ref(), Wanted::Condition, &mut problems);
    let write = rule.write.as_ref().zip(key).map(|(write, key)| BoundWrite {
        key,
        member,
        value: scope.value(&write.value, &mut lossy),
        life: scope.life(&write.life, &mut lossy),
        present_only: write.present_only,
        keep_on_delete: write.keep_on_delete,
        owns: write.owns,
        tags,
    });
    let settled = scope.settled(&wide, &mut problems);
    let refresh = wide.refresh(rule_index, &delete, &mut problems).map(Arc::new);
    let Parted { delete, settled, mut lookup } = wide.part(rule_index, delete, settled, &mut problems);
    lookup.iter_mut().for_each(|lookup| lookup.refresh.clone_from(&refresh));
    let changed = rule.changed.as_ref().and_then(|names| {
        let mut places = scope.places(names, &mut lossy)?;
        let written = write.iter().flat_map(|write| write.named_by().chain(write.tag_keys()));
        let keys = written.chain(&delete).chain(settled.keys()).chain(&settled.delete_tags);
        places.extend(keys.flat_map(BoundKey::columns));
        places.extend(settled.delete_match.iter().flat_map(BoundMatch::columns));
        places.extend(lookup.iter().flat_map(|lookup| lookup.row.iter().copied()));
        places.extend(when.iter().flat_map(|when| when.columns()));
        places.sort_unstable();
        places.dedup();
        Some(places)
    });
    let lookup = lookup.map(Arc::new);
    let (on, redelete) = (rule.on, rule.redelete);
    let bound = BoundRule { rule: rule_index, on, when, write, delete, refresh, redelete, settled, lookup, changed };
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

/// The names in templates that are columns of what the rule looks up: those that are nothing else. Whether the query gives
/// them is Postgres's to say.
fn looked_up(rule: &Rule, relation: &Relation) -> Vec<Spanned<String>> {
    let mut names: Vec<Spanned<String>> = Vec::new();
    if rule.lookup.is_none() {
        return names;
    }
    for (template, placeholder) in naming_placeholders(rule) {
        let name = &placeholder.name;
        let is_column = relation.column(name).is_some() && !rule.names_are_given;
        let known = is_column || names.iter().any(|known| known.value == *name);
        if !known && var(rule, name).is_none() {
            names.push(Spanned { value: name.clone(), span: placeholder_span(template, placeholder) });
        }
    }
    names
}

/// Every placeholder of the templates that name stale keys.
fn naming_placeholders(rule: &Rule) -> impl Iterator<Item = (&Spanned<Template>, &Placeholder)> {
    let Settled { delete_match, delete_tags, bump, .. } = &rule.settled;
    let templates = rule.delete.iter().chain(delete_match).chain(delete_tags).chain(bump);
    templates.flat_map(|template| placeholders(rule, template))
}

/// The names in the templates that name stale keys, and where they stand.
pub fn names_in_keys(rule: &Rule) -> impl Iterator<Item = Spanned<&str>> {
    naming_placeholders(rule).map(|(template, placeholder)| Spanned {
        value: placeholder.name.as_str(),
        span: placeholder_span(template, placeholder),
    })
}

/// Every placeholder that the template is filled from, those of its vars in their place; where names are given, those of
/// vars are columns, and no matter of what the template's own mean.
fn placeholders<'r>(
    rule: &'r Rule,
    template: &'r Spanned<Template>,
) -> impl Iterator<Item = (&'r Spanned<Template>, &'r Placeholder)> {
    template.value.placeholders().flat_map(move |placeholder| {
        let inner = var(rule, &placeholder.name);
        let own = inner.is_none().then_some((template, placeholder));
        let inner = inner.filter(|_| !rule.names_are_given);
        own.into_iter().chain(inner.into_iter().flat_map(|var| var.value.placeholders().map(move |part| (var, part))))
    })
}

fn var<'r>(rule: &'r Rule, name: &str) -> Option<&'r Spanned<Template>> {
    rule.vars.iter().find(|(var, _)| var.value == name).map(|(_, template)| template)
}

/// What a change makes stale: known from its row alone, or not.
struct Parted {
    delete: Vec<BoundKey>,
    settled: BoundSettled,
    lookup: Option<BoundLookup>,
}

/// What names mean while one rule is bound.
#[derive(Clone, Copy)]
struct Scope<'a> {
    rule: &'a Rule,
    relation: &'a Relation,
    facts: Option<&'a TableFacts>,
    types: &'a Types,
    prefix: &'a str,
    /// Columns behind those of the row.
    looked_up: &'a [Spanned<String>],
}

impl Scope<'_> {
    /// The place of a column; `span` is where the rule names it.
    fn column(&self, name: &str, span: Range<usize>) -> Result<usize, BindProblem> {
        let behind = self.looked_up.iter().position(|known| known.value == name);
        let own = self.relation.column(name).filter(|_| behind.is_none());
        let found = own.or_else(|| Some(self.relation.columns.len() + behind?));
        found.ok_or_else(|| {
            if name == PRIMARY_KEY {
                return BindProblem::NoPrimaryKey { span };
            }
            let hidden = self.facts.and_then(|facts| facts.hidden.iter().find(|column| column.name == name));
            let columns: Vec<String> = self.relation.columns.iter().map(|column| column.name.clone()).collect();
            let of_table = OF_TABLE.into_iter().filter(|_| name.starts_with('_'));
            let near = nearest(name, columns.iter().map(String::as_str).chain(of_table)).map(str::to_owned);
            match (hidden, self.facts) {
                (Some(hidden), Some(facts)) => BindProblem::HiddenColumn {
                    span,
                    column: hidden.clone(),
                    carrier: Box::new(facts.carrier.clone()),
                    published: columns,
                    row_filter: facts.row_filter.clone(),
                },
                _ => BindProblem::UnknownColumn { span, column: name.to_owned(), near, columns },
            }
        })
    }

    fn column_name(&self, place: usize) -> String {
        let behind = || &self.looked_up[place - self.relation.columns.len()].value;
        self.relation.columns.get(place).map_or_else(behind, |column| &column.name).clone()
    }

    /// Whether the log holds the column of an old row; what is looked up is no matter of the log.
    fn is_identity(&self, place: usize) -> bool {
        self.relation.columns.get(place).is_none_or(|column| column.identity)
    }

    /// A key template bound; `None` if a problem was added that keeps it from being rendered.
    fn key(&self, template: &Spanned<Template>, problems: &mut Vec<BindProblem>) -> Option<BoundKey> {
        let pieces = self.pieces(template, true, problems)?;
        let key = BoundKey::new(self.prefix, pieces, |place| self.is_identity(place));
        if self.has_identity() && self.rule.on.delete {
            problems.extend(self.outside_identity(template, &key));
        }
        problems.extend(self.reserved(template, &key.pattern));
        Some(key)
    }

    /// A tag's set.
    fn tag(&self, template: &Spanned<Template>, problems: &mut Vec<BindProblem>) -> Option<BoundKey> {
        let mut pieces = self.pieces(template, true, problems)?;
        match pieces.first_mut() {
            Some(Piece::Literal(first)) => *first = format!("{TAG}{first}").into(),
            _ => pieces.insert(0, Piece::Literal(TAG.into())),
        }
        let key = BoundKey::new(self.prefix, pieces, |place| self.is_identity(place));
        if self.has_identity() && self.rule.on.delete {
            problems.extend(self.outside_identity(template, &key));
        }
        Some(key)
    }

    /// A tag of the written key, which stands in it without the prefix of `[redis]`: that way what is written under several
    /// prefixes is the same, and no member can name a key outside.
    fn written_tag(
        &self,
        key: &Spanned<Template>,
        tag: &Spanned<Template>,
        problems: &mut Vec<BindProblem>,
    ) -> Option<BoundTag> {
        let text = self.text(key, &mut Vec::new());
        Some(BoundTag { key: self.tag(tag, problems)?, member: BoundMember { text: text?, of: Of::Tag } })
    }

    /// A key that could be one of keepstep's own.
    fn reserved(&self, template: &Spanned<Template>, pattern: &Pattern) -> Option<BindProblem> {
        let reserved = Pattern::beginning_with(format!("{}{RESERVED}", self.prefix).as_bytes());
        let key = pattern.common_key(&reserved)?;
        Some(BindProblem::ReservedKey { span: template.span.clone(), key })
    }

    /// What waits until the change is visible.
    /// In the `wide` scope keys may need what is looked up.
    fn settled(&self, wide: &Scope<'_>, problems: &mut Vec<BindProblem>) -> BoundSettled {
        let Settled { delete_match, delete_tags, bump, stream, publish } = &self.rule.settled;
        let mut settled = BoundSettled {
            delete_match: delete_match.iter().filter_map(|template| wide.matching(template, problems)).collect(),
            delete_tags: delete_tags.iter().filter_map(|template| wide.tag(template, problems)).collect(),
            bump: bump.iter().filter_map(|template| wide.key(template, problems)).collect(),
            publish: publish.as_ref().and_then(|channel| self.key(channel, problems)),
            stream: stream.as_ref().and_then(|stream| {
                let key = self.key(&stream.key, problems)?;
                Some(BoundStream { key, maxlen: stream.maxlen, ops: stream.ops })
            }),
            ..BoundSettled::default()
        };
        if settled.stream.is_some() || settled.publish.is_some() {
            let columns = self.relation.columns.iter().enumerate();
            settled.identity = columns.clone().filter(|(_, column)| column.identity).map(|(place, _)| place).collect();
            let source = |place: usize, type_oid| {
                let json = self.types.get(type_oid).json.clone();
                FieldSource::Column { place, json, as_string: false }
            };
            let fields = columns.map(|(place, column)| (column.name.clone(), source(place, column.type_oid)));
            // Columns that are not known are left out, so that each field may be the first.
            settled.row = fields.map(|(name, source)| JsonField { lead: field_lead(&name, false), source }).collect();
        }
        settled
    }

    /// The parameters of the query that refreshes the key.
    fn refresh(&self, rule: u16, keys: &[BoundKey], problems: &mut Vec<BindProblem>) -> Option<BoundRefresh> {
        let (query, key) = (self.rule.refresh.as_ref()?, keys.first()?.clone());
        // What is looked up has no type here: see [`shared_result`].
        if self.rule.lookup.is_none() {
            problems.extend(shared_result(query, &key));
        }
        // What the placeholders of the key stand for, without their filters.
        let alone = |name: &str| Template::parse_free(&format!("{{{name}}}")).ok();
        let text = |value: Template| self.text(&Spanned { value, span: query.key.span.clone() }, problems);
        let parameters: Option<Vec<BoundKey>> = query.parameters().into_iter().filter_map(alone).map(text).collect();
        Some(BoundRefresh { rule, query: Arc::clone(query), key, parameters: parameters? })
    }

    /// Parts what needs the lookup from what does not.
    fn part(
        &self,
        rule: u16,
        delete: Vec<BoundKey>,
        mut settled: BoundSettled,
        problems: &mut Vec<BindProblem>,
    ) -> Parted {
        let Some(sql) = &self.rule.lookup else { return Parted { delete, settled, lookup: None } };
        let width = self.relation.columns.len();
        let needs = |columns: &[usize]| columns.iter().any(|place| *place >= width);
        let (looked_up, delete) = delete.into_iter().partition(|key: &BoundKey| needs(&key.columns()));
        let matches = std::mem::take(&mut settled.delete_match).into_iter();
        let tags = std::mem::take(&mut settled.delete_tags).into_iter();
        let bumps = std::mem::take(&mut settled.bump).into_iter();
        let mut lookup = BoundLookup {
            rule,
            sql: sql.clone(),
            parameters: self.parameters(sql, problems),
            names: self.looked_up.to_vec(),
            row: Vec::new(),
            in_identity: false,
            width,
            rows_max: self.rule.rows_max,
            delete: looked_up,
            refresh: None,
            delete_match: Vec::new(),
            delete_tags: Vec::new(),
            bump: Vec::new(),
        };
        (lookup.delete_tags, settled.delete_tags) = tags.partition(|key| needs(&key.columns()));
        (lookup.delete_match, settled.delete_match) = matches.partition(|matching| needs(&matching.columns()));
        (lookup.bump, settled.bump) = bumps.partition(|key| needs(&key.columns()));
        if self.looked_up.is_empty() {
            problems.push(BindProblem::IdleLookup { span: sql.span.clone() });
        }
        let keys = lookup.delete.iter().chain(&lookup.delete_tags).chain(&lookup.bump).flat_map(BoundKey::columns);
        let matches = lookup.delete_match.iter().flat_map(BoundMatch::columns);
        let parameters = lookup.parameters.iter().map(|(place, _)| *place);
        let mut row: Vec<usize> = keys.chain(matches).chain(parameters).filter(|place| *place < width).collect();
        row.sort_unstable();
        row.dedup();
        lookup.in_identity = row.iter().all(|place| self.is_identity(*place));
        lookup.row = row;
        Parted { delete, settled, lookup: Some(lookup) }
    }

    /// The columns that the parameters of a query are, and their types. The old row must have them too.
    fn parameters(&self, sql: &Spanned<Sql>, problems: &mut Vec<BindProblem>) -> Vec<(usize, u32)> {
        let mut parameters = Vec::new();
        for name in sql.value.parameters() {
            let used = sql.value.uses().iter().find(|parameter| parameter.name == name);
            let span = used.map_or(sql.span.clone(), |used| place(&sql.span, sql.value.text(), &used.range));
            let row = Scope { looked_up: &[], ..*self };
            match row.column(name, span.clone()) {
                Ok(place) => {
                    parameters.push((place, self.relation.columns[place].type_oid));
                    if self.has_identity() && self.rule.on.delete {
                        problems.extend(self.columns_outside_identity(span, &[place]));
                    }
                }
                Err(problem) => problems.push(problem),
            }
        }
        parameters
    }

    /// A `delete_match`: its literals are split where a `*` stands.
    fn matching(&self, template: &Spanned<Template>, problems: &mut Vec<BindProblem>) -> Option<BoundMatch> {
        let mut parts = vec![Vec::new()];
        for piece in self.pieces(template, true, problems)? {
            let Piece::Literal(text) = &piece else {
                parts.last_mut()?.push(piece);
                continue;
            };
            for (index, text) in text.split('*').enumerate() {
                if index > 0 {
                    parts.push(Vec::new());
                }
                if !text.is_empty() {
                    parts.last_mut()?.push(Piece::Literal(text.into()));
                }
            }
        }
        let is_identity = |place: usize| self.is_identity(place);
        let mut prefix = self.prefix;
        let bound = parts.into_iter().map(|part| BoundKey::new(std::mem::take(&mut prefix), part, is_identity));
        let bound: Vec<BoundKey> = bound.collect();
        if self.has_identity() && self.rule.on.delete {
            let columns: Vec<usize> = bound.iter().flat_map(BoundKey::columns).collect();
            problems.extend(self.columns_outside_identity(template.span.clone(), &columns));
        }
        let matching = BoundMatch::new(self.prefix, bound);
        problems.extend(self.reserved(template, &matching.pattern));
        Some(matching)
    }

    /// The member of a set; `None` where there is none, or a problem was added.
    fn member(&self, value: &Value, problems: &mut Vec<BindProblem>) -> Option<BoundMember> {
        let Value::Member { member, score } = value else { return None };
        let text = self.text(member, problems)?;
        if self.has_identity() && self.rule.on.delete {
            problems.extend(self.outside_identity(member, &text));
        }
        Some(BoundMember { text, of: if score.is_some() { Of::SortedSet } else { Of::Set } })
    }

    /// A template that is no key.
    fn text(&self, template: &Spanned<Template>, problems: &mut Vec<BindProblem>) -> Option<BoundKey> {
        let pieces = self.pieces(template, true, problems)?;
        Some(BoundKey::new("", pieces, |place| self.is_identity(place)))
    }

    /// `None` if there is no expression, or a problem was added.
    fn expression(
        &self,
        expression: Option<&Spanned<Expression>>,
        wanted: Wanted,
        problems: &mut Vec<BindProblem>,
    ) -> Option<BoundExpression> {
        let expression = expression?;
        let scope = expression::Scope { relation: self.relation, types: self.types, names: Names::Row };
        match expression::bind(&expression.value, &scope, wanted) {
            Ok(bound) => Some(bound),
            Err(errors) => {
                let at = |error: &ExpressionError| place(&expression.span, expression.value.text(), &error.range);
                problems.extend(errors.into_iter().map(|error| BindProblem::Expression { span: at(&error), error }));
                None
            }
        }
    }

    /// `None` if a column of it is missing.
    fn value(&self, value: &Value, problems: &mut Vec<BindProblem>) -> Option<BoundValue> {
        match value {
            Value::Text(text) => self.text(text, problems).map(BoundValue::Text),
            Value::Member { score: None, .. } => Some(BoundValue::Nothing),
            Value::Member { score, .. } => {
                self.expression(score.as_ref(), Wanted::Number, problems).map(BoundValue::Score)
            }
            Value::Row(row) => {
                let fields = self.fields(row, problems)?;
                Some(match row.form {
                    RowForm::Json => BoundValue::Json(Form::String, json_fields(fields)),
                    RowForm::Rejson => BoundValue::Json(Form::Json, json_fields(fields)),
                    RowForm::Hash => {
                        let field = |(name, source): (String, _)| HashField { name: name.into_bytes().into(), source };
                        BoundValue::Hash(fields.into_iter().map(field).collect())
                    }
                })
            }
        }
    }

    /// Where a column is missing the key lives for ever, but then it has no value either.
    fn life(&self, life: &Life, problems: &mut Vec<BindProblem>) -> BoundLife {
        let bound = match life {
            Life::Forever => Some(BoundLife::Forever),
            Life::Keep => Some(BoundLife::Keep),
            Life::Ttl(Lifetime::Constant(ttl), jitter) => Some(BoundLife::Ttl(*ttl, *jitter)),
            Life::Ttl(Lifetime::OfRow(ttl), jitter) => {
                self.expression(Some(ttl), Wanted::Number, problems).map(|ttl| BoundLife::OfRow(ttl, *jitter))
            }
            Life::Until(at) => self.expression(Some(at), Wanted::Timestamp, problems).map(BoundLife::Until),
        };
        bound.unwrap_or(BoundLife::Forever)
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
        // Where names are given, columns stand in vars and nothing else does.
        let looked_up = if self.rule.names_are_given && !with_vars { &[] } else { self.looked_up };
        match (Scope { looked_up, ..*self }).column(&placeholder.name, placeholder_span(template, placeholder)) {
            Ok(place) => {
                let base = self.relation.columns.get(place).map_or(TEXT, |column| self.types.get(column.type_oid).base);
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
            let publication = facts.carrier.name().to_owned();
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
        let needed = self.row_columns(&key.columns());
        let placeholders = template.value.placeholders().zip(key.placeholder_columns());
        let missing = placeholders.filter_map(|(placeholder, mut columns)| {
            columns.retain(|place| !self.is_identity(*place));
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

    /// The same for a template that is bound in parts.
    fn columns_outside_identity(&self, span: Range<usize>, columns: &[usize]) -> Option<BindProblem> {
        let missing = columns.iter().filter(|place| !self.is_identity(**place));
        let missing: Vec<String> = missing.map(|place| self.column_name(*place)).collect();
        let needed = self.row_columns(columns);
        let sent = self.relation.columns.iter().filter(|column| column.identity).map(|column| column.name.clone());
        (!missing.is_empty()).then(|| BindProblem::NotInIdentity {
            span,
            columns: missing,
            identity: self.relation.identity,
            sent: sent.collect(),
            remedy: self.identity_remedy(&needed),
        })
    }

    /// The names of those that are the table's own.
    fn row_columns(&self, places: &[usize]) -> Vec<String> {
        let own = places.iter().filter_map(|place| self.relation.columns.get(*place));
        own.map(|column| column.name.clone()).collect()
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
    fn shared_key(
        &self,
        template: &Spanned<Template>,
        key: &BoundKey,
        member: Option<&BoundMember>,
    ) -> Option<BindProblem> {
        let facts = self.facts?;
        let values = key.values();
        let of_member = member.map(|member| member.text.values()).unwrap_or_default();
        let named = |places: &[usize]| places.iter().map(|place| self.column_name(*place)).collect::<Vec<_>>();
        let told = values.iter().chain(&of_member).filter(|value| value.lost.is_none());
        let told: Vec<String> = told.flat_map(|value| named(&value.columns)).collect();
        let is_in =
            |columns: &[String], index: &UniqueIndex| index.columns.iter().all(|column| columns.contains(column));
        if facts.unique.iter().any(|index| is_in(&told, index)) {
            return None;
        }
        let columns = key.columns().into_iter().chain(member.iter().flat_map(|member| member.text.columns()));
        let used = named(&columns.collect::<Vec<_>>());
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
                Lost::Boundary(boundary) => Sharing::Boundary(boundary),
            };
            Some((value.placeholder, how))
        });
        let (placeholder, how) = lost?;
        let span = template.value.placeholders().nth(placeholder).map(|found| placeholder_span(template, found));
        Some(BindProblem::SharedKey { span: span.unwrap_or(template.span.clone()), how })
    }

    /// The places of all these columns, or `None` and a problem for each that is missing.
    fn places(&self, names: &[Spanned<String>], problems: &mut Vec<BindProblem>) -> Option<Vec<usize>> {
        let found = names.iter().map(|name| self.column(&name.value, name.span.clone()));
        let places: Vec<usize> =
            found.filter_map(|place| place.map_err(|problem| problems.push(problem)).ok()).collect();
        (places.len() == names.len()).then_some(places)
    }

    /// The fields of the value; `None` if a column of it is missing.
    fn fields(&self, row: &RowValue, problems: &mut Vec<BindProblem>) -> Option<Vec<(String, FieldSource)>> {
        let known = problems.len();
        let columns = match &row.columns.value {
            ColumnSelection::All => (0..self.relation.columns.len()).collect(),
            ColumnSelection::Named(names) => self.places(names, problems).unwrap_or_default(),
        };
        self.places(&row.strings, problems);
        let mut fields: Vec<(String, FieldSource)> = Vec::with_capacity(columns.len() + row.compute.len());
        let mut add = |field: &str, span: &Range<usize>, source, problems: &mut Vec<BindProblem>| {
            if fields.iter().any(|(taken, _)| taken == field) {
                problems.push(BindProblem::DuplicateField { span: span.clone(), field: field.to_owned() });
            }
            fields.push((field.to_owned(), source));
        };
        for place in columns {
            let name = &self.relation.columns[place].name;
            let renamed = row.rename.iter().find(|(from, _)| from.value == *name).map(|(_, to)| to);
            let field = renamed.map_or(name.as_str(), |to| to.value.as_str());
            let source = FieldSource::Column {
                place,
                json: self.types.get(self.relation.columns[place].type_oid).json.clone(),
                as_string: row.strings.iter().any(|string| string.value == *name),
            };
            add(field, renamed.map_or(&row.columns.span, |to| &to.span), source, problems);
        }
        for (name, expression) in &row.compute {
            if let Some(computed) = self.expression(Some(expression), Wanted::Value, problems) {
                add(&name.value, &name.span, FieldSource::Computed(computed), problems);
            }
        }
        for (from, _) in &row.rename {
            problems.extend(self.column(&from.value, from.span.clone()).err());
        }
        (problems.len() == known).then_some(fields)
    }
}

/// Why two results of the query could have this key of it, if they can.
pub fn shared_result(query: &Query, key: &BoundKey) -> Option<BindProblem> {
    let (placeholder, boundary) = key.boundary()?;
    let found = query.key.value.placeholders().nth(placeholder).map(|found| placeholder_span(&query.key, found));
    Some(BindProblem::SharedResult { span: found.unwrap_or(query.key.span.clone()), boundary })
}

fn json_fields(fields: Vec<(String, FieldSource)>) -> Vec<JsonField> {
    let lead =
        |(index, (name, source)): (usize, (String, _))| JsonField { lead: field_lead(&name, index == 0), source };
    fields.into_iter().enumerate().map(lead).collect()
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
