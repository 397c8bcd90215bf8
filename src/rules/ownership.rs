//! Who may touch which key: no two rules write the same one, and none deletes what another writes.
//!
//! The keys of a template are compared as languages (see [`crate::rules::pattern`]), so nothing depends on the rows
//! that happen to be there. Two rules that only delete may share keys freely.

use super::bind::{BoundKey, BoundRule};
use crate::config::code::Code;
use crate::config::diagnostic::Diagnostic;
use crate::config::{Rule, Spanned};
use crate::rules::template::Template;

/// A template of a rule, bound.
struct Owned<'a> {
    rule: &'a Rule,
    template: &'a Spanned<Template>,
    key: &'a BoundKey,
}

/// The keys that two of the rules would fight for; each pair of templates is reported once.
pub fn check_overlaps(bound: &[(&Rule, &BoundRule)]) -> Vec<Diagnostic> {
    let written: Vec<Owned<'_>> = bound.iter().filter_map(|(rule, bound)| written(rule, bound)).collect();
    let deleted = bound.iter().flat_map(|(rule, bound)| {
        rule.delete.iter().zip(&bound.delete).map(|(template, key)| Owned { rule, template, key })
    });
    let mut found = Vec::new();
    for (index, second) in written.iter().enumerate() {
        for first in &written[..index] {
            if let Some(key) = first.key.pattern.common_key(&second.key.pattern) {
                found.push(both_write(first, second, &key));
            }
        }
    }
    for deleting in deleted {
        for writing in &written {
            if let Some(key) = writing.key.pattern.common_key(&deleting.key.pattern) {
                found.push(writes_and_deletes(writing, &deleting, &key));
            }
        }
    }
    found
}

fn written<'a>(rule: &'a Rule, bound: &'a BoundRule) -> Option<Owned<'a>> {
    let (action, write) = rule.write.as_ref().zip(bound.write.as_ref())?;
    Some(Owned { rule, template: &action.key, key: &write.key })
}

fn both_write(first: &Owned<'_>, second: &Owned<'_>, key: &[u8]) -> Diagnostic {
    let (one, other) = (&first.rule.name.value, &second.rule.name.value);
    let key = String::from_utf8_lossy(key);
    Diagnostic::error(
        Code::KeyOfTwoRules,
        format!("rules `{one}` and `{other}` can write the same key, so one would overwrite the other"),
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
