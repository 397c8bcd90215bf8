//! A key template bound to a relation: names have become places in the tuple.

use super::filter::Filter;
use super::pattern::{Language, Pattern};
use crate::model::Datum;

/// A key template, ready for the tuples of one relation.
#[derive(Clone, Debug)]
pub struct BoundKey {
    /// Whether every column it uses is in the replica identity, so that an [`crate::model::OldTuple::Key`] renders it.
    pub in_identity: bool,
    /// The keys that the template can have made from this relation.
    pub pattern: Pattern,
    /// What every key begins with: the prefix of `[redis]` and the template's own first literal.
    prefix: Box<[u8]>,
    pieces: Box<[Piece]>,
}

/// How rendering a key ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rendered {
    /// The key was appended.
    Done,
    /// A column without a default is NULL: the row has no key.
    Null,
    /// A value that the change did not carry (unchanged TOAST): the key is not known.
    Unknown,
}

/// What a template consists of, in order.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    Literal(Box<[u8]>),
    Value { source: Source, default: Option<Box<[u8]>>, filters: Box<[Filter]> },
}

/// Where a placeholder's value comes from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// The column at this place, of this type (behind all domains).
    Column { place: usize, base: u32 },
    /// One of the rule's `vars`.
    Var(Box<[Piece]>),
}

impl BoundKey {
    /// `prefix`, then the pieces; `is_identity` says of a column's place whether it is in the replica identity.
    pub(super) fn new(prefix: &str, mut pieces: Vec<Piece>, is_identity: impl Fn(usize) -> bool) -> Self {
        let in_identity = columns(&pieces).into_iter().all(is_identity);
        let mut first = prefix.as_bytes().to_vec();
        if let Some(Piece::Literal(literal)) = pieces.first() {
            first.extend_from_slice(literal);
            pieces.remove(0);
        }
        let pattern = Pattern::new(&first, &languages(&pieces));
        BoundKey { in_identity, pattern, prefix: first.into(), pieces: pieces.into() }
    }

    /// Appends the row's key to `out`; nothing is left there unless it is [`Rendered::Done`].
    ///
    /// `row` holds one datum for each column of the relation the key was bound to. With the data of an
    /// [`crate::model::OldTuple::Key`] only a key that is [`BoundKey::in_identity`] can be rendered: there a NULL may
    /// also mean "unknown".
    pub fn render(&self, row: &[Datum<'_>], out: &mut Vec<u8>) -> Rendered {
        let start = out.len();
        out.extend_from_slice(&self.prefix);
        let rendered = render(&self.pieces, row, out);
        if rendered != Rendered::Done {
            out.truncate(start);
        }
        rendered
    }

    /// The places of the columns it uses, each once, in ascending order.
    pub fn columns(&self) -> Vec<usize> {
        columns(&self.pieces)
    }

    /// The same for each placeholder of the template, in order.
    pub(super) fn placeholder_columns(&self) -> impl Iterator<Item = Vec<usize>> {
        let placeholders = self.pieces.iter().filter(|piece| matches!(piece, Piece::Value { .. }));
        placeholders.map(|piece| columns(std::slice::from_ref(piece)))
    }

    /// What the key says of each value it was made from.
    pub(super) fn values(&self) -> Vec<KeyValue> {
        values(&self.prefix, &self.pieces)
    }
}

/// What a key says of one of the values it was made from.
#[derive(Clone, Debug)]
pub(super) struct KeyValue {
    /// Which placeholder of the template, counted from 0.
    pub(super) placeholder: usize,
    /// The columns that its value is made of.
    pub(super) columns: Vec<usize>,
    /// Why it cannot be told, if so.
    pub(super) lost: Option<Lost>,
}

/// Why two values can give the same key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lost {
    /// The filter maps different values to the same one.
    Filter(Filter),
    /// The default looks like a value.
    Default,
    /// Where the value ends depends on the reading.
    Boundary {
        /// A key (the text of a var, if it is there) with two readings.
        key: Vec<u8>,
        /// Whether `urlencode` at this placeholder would end that.
        encoding_helps: bool,
    },
}

fn values(prefix: &[u8], pieces: &[Piece]) -> Vec<KeyValue> {
    let languages = languages(pieces);
    let pattern = Pattern::new(prefix, &languages);
    let boundary = |at: usize| {
        let key = pattern.ambiguous_key(at)?;
        let mut encoded = languages.clone();
        encoded[at] = encoded[at].clone().filtered(Filter::UrlEncode);
        let encoding_helps = Pattern::new(prefix, &encoded).ambiguous_key(at).is_none();
        Some(Lost::Boundary { key, encoding_helps })
    };
    let mut found = Vec::new();
    let mut placeholder = 0;
    for (at, piece) in pieces.iter().enumerate() {
        let Piece::Value { source, default, filters } = piece else { continue };
        let filter = filters.iter().find(|filter| !filter.is_injective()).map(|filter| Lost::Filter(*filter));
        let lost = filter.or_else(|| default.as_ref().map(|_| Lost::Default)).or_else(|| boundary(at));
        match source {
            Source::Column { place, .. } => found.push(KeyValue { placeholder, columns: vec![*place], lost }),
            Source::Var(inner) => {
                let of_var = |value: KeyValue| KeyValue { placeholder, lost: lost.clone().or(value.lost), ..value };
                found.extend(values(b"", inner).into_iter().map(of_var));
            }
        }
        placeholder += 1;
    }
    found
}

fn languages(pieces: &[Piece]) -> Vec<Language> {
    pieces.iter().map(Piece::language).collect()
}

/// The places of the columns that the pieces use, each once, in ascending order.
fn columns(pieces: &[Piece]) -> Vec<usize> {
    let of_piece = |piece: &Piece| match piece {
        Piece::Literal(_) => Vec::new(),
        Piece::Value { source: Source::Column { place, .. }, .. } => vec![*place],
        Piece::Value { source: Source::Var(inner), .. } => columns(inner),
    };
    let mut places: Vec<usize> = pieces.iter().flat_map(of_piece).collect();
    places.sort_unstable();
    places.dedup();
    places
}

fn render(pieces: &[Piece], row: &[Datum<'_>], out: &mut Vec<u8>) -> Rendered {
    for piece in pieces {
        match piece {
            Piece::Literal(bytes) => out.extend_from_slice(bytes),
            Piece::Value { source, default, filters } => {
                let start = out.len();
                match (render_source(source, row, out), default) {
                    (Rendered::Done, _) => {
                        for filter in filters {
                            filter.apply(out, start);
                        }
                    }
                    (Rendered::Null, Some(default)) => {
                        out.truncate(start);
                        out.extend_from_slice(default);
                    }
                    (incomplete, _) => return incomplete,
                }
            }
        }
    }
    Rendered::Done
}

fn render_source(source: &Source, row: &[Datum<'_>], out: &mut Vec<u8>) -> Rendered {
    match source {
        Source::Var(pieces) => render(pieces, row, out),
        Source::Column { place, .. } => match row.get(*place) {
            Some(Datum::Text(bytes)) => {
                out.extend_from_slice(bytes);
                Rendered::Done
            }
            Some(Datum::Null) => Rendered::Null,
            Some(Datum::UnchangedToast) | None => Rendered::Unknown,
        },
    }
}

impl Piece {
    /// A placeholder; the default is what stands in for NULL, before the filters.
    pub(super) fn value(source: Source, default: Option<&str>, filters: &[Filter]) -> Self {
        let default = default.map(|text| {
            let mut bytes = text.as_bytes().to_vec();
            for filter in filters {
                filter.apply(&mut bytes, 0);
            }
            bytes.into_boxed_slice()
        });
        Piece::Value { source, default, filters: filters.into() }
    }

    /// Everything it can stand for.
    fn language(&self) -> Language {
        match self {
            Piece::Literal(bytes) => Language::literal(bytes),
            Piece::Value { source, default, filters } => {
                let own = match source {
                    Source::Column { base, .. } => Language::of_type(*base),
                    Source::Var(pieces) => Language::Sequence(languages(pieces)),
                };
                let filtered = filters.iter().fold(own, |language, filter| language.filtered(*filter));
                match default {
                    Some(default) => filtered.or(Language::literal(default)),
                    None => filtered,
                }
            }
        }
    }
}
