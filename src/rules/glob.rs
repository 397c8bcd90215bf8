//! Patterns with `*`, filled from a row: `delete_match`.
//!
//! Only the rule's own `*` matches anything; what a row puts in stands for itself, whatever characters it has.

use std::fmt;

use super::key::{BoundKey, Rendered};
use super::pattern::{Language, Pattern};
use crate::model::Datum;

/// A `delete_match`, ready for the rows of one relation.
#[derive(Clone, Debug)]
pub struct BoundMatch {
    /// Everything that it can match, whatever the row is.
    pub pattern: Pattern,
    /// What stands between its `*`; the first one begins with the prefix of `[redis]`.
    parts: Box<[BoundKey]>,
}

impl BoundMatch {
    /// From the parts between the `*`.
    pub(super) fn new(prefix: &str, parts: Vec<BoundKey>) -> Self {
        let (literal, mut languages) = parts.first().map(|part| part.form.split()).unwrap_or_default();
        for part in parts.iter().skip(1) {
            languages.push(Language::anything());
            languages.extend(part.form.languages());
        }
        let pattern = Pattern::under_prefix(prefix.as_bytes(), literal, &languages);
        BoundMatch { pattern, parts: parts.into() }
    }

    /// What it matches for this row; `None` where a column is NULL, or not known.
    pub fn render(&self, row: &[Datum<'_>]) -> Result<Glob, Rendered> {
        let part = |part: &BoundKey| {
            let mut text = Vec::new();
            match part.render(row, &mut text) {
                Rendered::Done => Ok(text.into()),
                other => Err(other),
            }
        };
        Ok(Glob(self.parts.iter().map(part).collect::<Result<_, _>>()?))
    }

    /// Whether every column it uses is in the replica identity.
    pub fn in_identity(&self) -> bool {
        self.parts.iter().all(|part| part.in_identity)
    }

    /// The places of the columns it uses.
    pub fn columns(&self) -> Vec<usize> {
        self.parts.iter().flat_map(BoundKey::columns).collect()
    }
}

/// Texts with anything between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Glob(Box<[Box<[u8]>]>);

impl Glob {
    /// Whether the key is these texts in this order, with anything between them.
    pub fn matches(&self, key: &[u8]) -> bool {
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else { return false };
        if self.0.len() == 1 {
            return **first == *key;
        }
        let Some(mut rest) = key.strip_prefix(&**first).and_then(|rest| rest.strip_suffix(&**last)) else {
            return false;
        };
        // The earliest place leaves the most for those that follow.
        self.0[1..self.0.len() - 1].iter().all(|part| match find(rest, part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    }

    /// What every such key begins with.
    pub fn literal_prefix(&self) -> &[u8] {
        self.0.first().map(|first| &**first).unwrap_or_default()
    }

    /// How long its texts are.
    pub fn byte_len(&self) -> usize {
        self.0.iter().map(|part| part.len()).sum()
    }

    /// The same under another prefix of `[redis]`; they are under one of `len` bytes.
    pub fn under(&self, prefix: &[u8], len: usize) -> Self {
        let mut parts = self.0.clone();
        if let Some(first) = parts.first_mut() {
            *first = [prefix, &first[len..]].concat().into();
        }
        Glob(parts)
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    if part.is_empty() {
        return Some(0);
    }
    text.windows(part.len()).position(|window| window == part)
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<_> = self.0.iter().map(|part| String::from_utf8_lossy(part)).collect();
        f.write_str(&parts.join("*"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(parts: &[&str]) -> Glob {
        Glob(parts.iter().map(|part| part.as_bytes().into()).collect())
    }

    #[test]
    fn only_stars_of_the_rule_match_anything() {
        for (parts, key, expected) in [
            (&["list:", ""][..], "list:", true),
            (&["list:", ""], "list:1:2", true),
            (&["list:", ""], "lists:1", false),
            (&["list:*:", ""], "list:7:x", false),
            (&["list:*:", ""], "list:*:x", true),
            (&["a:", ":z"], "a::z", true),
            (&["a:", ":z"], "a:z", false),
            (&["a:", ":m:", ":z"], "a:1:m:2:z", true),
            (&["a:", ":m:", ":z"], "a:1:m:z", false),
            (&["a:", "m", "m", ""], "a:mm", true),
            (&["a:", "m", "m", ""], "a:m", false),
            (&["a"], "a", true),
            (&["a"], "ab", false),
        ] {
            assert_eq!(glob(parts).matches(key.as_bytes()), expected, "{parts:?} {key}");
        }
    }

    #[test]
    fn another_prefix_stands_in_for_the_first() {
        let moved = glob(&["v1:list:", ""]).under(b"older:", 3);
        assert_eq!(moved.to_string(), "older:list:*");
    }
}
