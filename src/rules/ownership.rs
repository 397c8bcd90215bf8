//! Who may touch which key: no two rules write the same one, and none deletes what another writes.
//!
//! The keys of a template are compared as languages (see [`crate::rules::pattern`]), so nothing depends on the rows
//! that happen to be there. Two rules that only delete may share keys freely, as may two that write the same generation
//! or to the same stream, or that put members into the same tag: a tag that is deleted keeps those.

use std::sync::Arc;

use super::bind::BoundRule;
use super::pattern::Pattern;
use crate::config::code::Code;
use crate::config::diagnostic::Diagnostic;
use crate::config::{Rule, Spanned};
use crate::rules::template::Template;

/// A template of a rule, bound.
struct Owned<'a> {
    rule: &'a Rule,
    template: &'a Spanned<Template>,
    pattern: &'a Pattern,
}

impl Owned<'_> {
    /// Whether both are the key of one query, by two of its tables.
    fn of_same_query(&self, other: &Owned<'_>) -> bool {
        let both = self.rule.refresh.as_ref().zip(other.rule.refresh.as_ref());
        both.is_some_and(|(one, other)| Arc::ptr_eq(one, other))
    }
}

/// What is written to a key.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    /// Rows, or what a query answers.
    Value,
    /// `bump`
    Generation,
    /// `stream`
    Entries,
    /// `tags`
    Members,
}

/// The keys that two of the rules would fight for; each pair of templates is reported once.
pub fn check_overlaps(bound: &[(&Rule, &BoundRule)]) -> Vec<Diagnostic> {
    let mut written: Vec<(Written, Owned<'_>)> = Vec::new();
    for (what, owned) in bound.iter().flat_map(|(rule, bound)| self::written(rule, bound)) {
        // The key of a query is one, whichever of its tables has it written.
        if !written.iter().any(|(_, known)| known.of_same_query(&owned)) {
            written.push((what, owned));
        }
    }
    let mut found = Vec::new();
    for (index, (what, second)) in written.iter().enumerate() {
        let apart = |other: &&(Written, Owned<'_>)| *what == Written::Value || other.0 != *what;
        for (_, first) in written[..index].iter().filter(apart) {
            if let Some(key) = first.pattern.common_key(second.pattern) {
                found.push(both_write(first, second, &key));
            }
        }
    }
    for (is_tag, deleting) in bound.iter().flat_map(|(rule, bound)| deleted(rule, bound)) {
        for (_, writing) in written.iter().filter(|(what, _)| !is_tag || *what != Written::Members) {
            if let Some(key) = writing.pattern.common_key(deleting.pattern) {
                found.push(writes_and_deletes(writing, &deleting, &key));
            }
        }
    }
    found
}

fn written<'a>(rule: &'a Rule, bound: &'a BoundRule) -> impl Iterator<Item = (Written, Owned<'a>)> {
    let value = rule.write.iter().map(|write| &write.key).zip(bound.write.iter().map(|write| &write.key));
    let generations = bound.bump_templates(rule);
    let streams = rule.settled.stream.iter().map(|stream| &stream.key);
    let entries = streams.zip(bound.settled.stream.iter().map(|stream| &stream.key));
    let tags = rule.write.iter().flat_map(|write| &write.tags);
    let tags = tags.zip(bound.write.iter().flat_map(|write| write.tag_keys()));
    let refreshed = bound.delete_templates(rule).into_iter().filter(|_| rule.refresh.is_some());
    let all = value.chain(refreshed).map(|pair| (Written::Value, pair));
    let all = all.chain(tags.map(|pair| (Written::Members, pair)));
    let all = all.chain(generations.into_iter().map(|pair| (Written::Generation, pair)));
    let all = all.chain(entries.map(|pair| (Written::Entries, pair)));
    all.map(move |(what, (template, key))| (what, Owned { rule, template, pattern: &key.pattern }))
}

/// Templates of keys, and of tags, that go.
fn deleted<'a>(rule: &'a Rule, bound: &'a BoundRule) -> impl Iterator<Item = (bool, Owned<'a>)> {
    let keys = bound.delete_templates(rule).into_iter().filter(|_| rule.refresh.is_none());
    let keys = keys.map(|(template, key)| (template, &key.pattern));
    let matching = bound.match_templates(rule).into_iter().map(|(template, matching)| (template, &matching.pattern));
    let tags = bound.tag_templates(rule).into_iter().map(|(template, tag)| (template, &tag.pattern));
    let all = keys.chain(matching).map(|pair| (false, pair)).chain(tags.map(|pair| (true, pair)));
    all.map(move |(is_tag, (template, pattern))| (is_tag, Owned { rule, template, pattern }))
}

fn both_write(first: &Owned<'_>, second: &Owned<'_>, key: &[u8]) -> Diagnostic {
    let (one, other) = (&first.rule.name.value, &second.rule.name.value);
    let key = String::from_utf8_lossy(key);
    let both = if one == other { format!("rule `{one}`") } else { format!("rules `{one}` and `{other}`") };
    Diagnostic::error(
        Code::KeyOfTwoRules,
        format!("{both} can write the same key, so one would overwrite the other"),
        second.template.span.clone(),
        format!("can make `{key}` as well"),
    )
    .context(first.template.span.clone(), format!("can make `{key}`"))
    .help("begin the keys of each rule with a literal of its own")
    .help("where a text value could look like what follows it, `{column|urlencode}` keeps them apart")
}

fn writes_and_deletes(writing: &Owned<'_>, deleting: &Owned<'_>, key: &[u8]) -> Diagnostic {
    let (writer, deleter) = (&writing.rule.name.value, &deleting.rule.name.value);
    let key = String::from_utf8_lossy(key);
    let title = if writer == deleter {
        format!("rule `{writer}` deletes keys that it writes")
    } else {
        format!("rule `{deleter}` deletes keys that rule `{writer}` writes")
    };
    Diagnostic::error(Code::DeletesWritten, title, deleting.template.span.clone(), format!("can delete `{key}`"))
        .context(writing.template.span.clone(), format!("can write `{key}`"))
        .help("begin the keys of each with a literal of its own; a written key follows its row by itself")
}
