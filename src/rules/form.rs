//! A key template bound to types instead of to a relation: enough to know its keys again.
//!
//! Rules change and go, and so do the types of columns; the keys that were made stay until somebody deletes them. What
//! remains of a template in the cache's own record ([`crate::cache::claims`]) is this: its literals, and for each
//! placeholder what its value can look like. It is bound anew under any prefix, without the rules file and without the
//! catalog.

use serde::{Deserialize, Serialize};

use super::filter::Filter;
use super::pattern::{Language, Pattern};
use super::template::TAG;

/// What a template consists of, in order; `C` is what is known of a column.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Piece<C> {
    /// Stands in every key as it is.
    Literal(Box<str>),
    /// Stands for a value.
    Value {
        source: Source<C>,
        /// Stands in for NULL, before the filters.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        default: Option<Box<str>>,
        #[serde(default = "no_filters", skip_serializing_if = "<[Filter]>::is_empty")]
        filters: Box<[Filter]>,
    },
}

fn no_filters() -> Box<[Filter]> {
    Box::default()
}

/// Where a placeholder's value comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Source<C> {
    /// A column.
    Column(C),
    /// One of the rule's `vars`.
    Var(Box<[Piece<C>]>),
}

impl<C> Piece<C> {
    /// The same with something else said of its columns.
    fn map<D>(&self, column: &impl Fn(&C) -> D) -> Piece<D> {
        match self {
            Piece::Literal(text) => Piece::Literal(text.clone()),
            Piece::Value { source, default, filters } => {
                let source = match source {
                    Source::Column(said) => Source::Column(column(said)),
                    Source::Var(pieces) => Source::Var(pieces.iter().map(|piece| piece.map(column)).collect()),
                };
                Piece::Value { source, default: default.clone(), filters: filters.clone() }
            }
        }
    }
}

/// A column's type, behind all domains: its OID. Those whose text form is known are the same in every database.
pub(super) type TypeOid = u32;

/// A key template whose columns are types. Stored as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyForm(Box<[Piece<TypeOid>]>);

impl KeyForm {
    /// Of a template's pieces.
    pub(super) fn new<C>(pieces: &[Piece<C>], type_of: impl Fn(&C) -> TypeOid) -> Self {
        KeyForm(pieces.iter().map(|piece| piece.map(&type_of)).collect())
    }

    /// The keys that it can have made under this prefix of `[redis]`.
    pub fn pattern(&self, prefix: &str) -> Pattern {
        let (literal, rest) = self.split();
        Pattern::under_prefix(prefix.as_bytes(), literal, &rest)
    }

    /// The literal that it begins with, and what each of its other pieces can stand for.
    pub(super) fn split(&self) -> (&[u8], Vec<Language>) {
        let (literal, rest) = match self.0.split_first() {
            Some((Piece::Literal(literal), rest)) => (literal.as_bytes(), rest),
            _ => (&b""[..], &*self.0),
        };
        (literal, languages(rest))
    }

    /// Whether such a key is a tag: a set of other keys.
    pub fn is_tag(&self) -> bool {
        self.split().0.starts_with(TAG.as_bytes())
    }

    /// Whether such a key can hardly be anybody else's: see [`Pattern::is_exact`].
    pub fn is_exact(&self) -> bool {
        self.languages().iter().all(Language::is_exact)
    }

    /// What each of its pieces can stand for.
    pub(super) fn languages(&self) -> Vec<Language> {
        languages(&self.0)
    }
}

fn languages(pieces: &[Piece<TypeOid>]) -> Vec<Language> {
    pieces.iter().map(language).collect()
}

/// Everything that the piece can stand for.
fn language(piece: &Piece<TypeOid>) -> Language {
    match piece {
        Piece::Literal(text) => Language::literal(text.as_bytes()),
        Piece::Value { source, default, filters } => {
            let own = match source {
                Source::Column(oid) => Language::of_type(*oid),
                Source::Var(pieces) => Language::Sequence(languages(pieces)),
            };
            let filtered = filters.iter().fold(own, |language, filter| language.filtered(*filter));
            match default {
                Some(default) => filtered.or(Language::literal(&in_key(default, filters))),
                None => filtered,
            }
        }
    }
}

/// A value as it stands in a key.
fn in_key(text: &str, filters: &[Filter]) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for filter in filters {
        filter.apply(&mut bytes, 0);
    }
    bytes
}
