//! A key template bound to a relation: names have become places in the tuple.

use super::filter::Filter;
use super::form::{KeyForm, Piece, Source};
use super::pattern::{Language, Pattern};
use crate::model::Datum;

/// A key template, ready for the tuples of one relation.
#[derive(Clone, Debug)]
pub struct BoundKey {
    /// Whether every column it uses is in the replica identity, so that an [`crate::model::OldTuple::Key`] renders it.
    pub in_identity: bool,
    /// The keys that the template can have made from this relation.
    pub pattern: Pattern,
    /// What is left of it when the relation is forgotten.
    pub form: KeyForm,
    /// What every key begins with: the prefix of `[redis]` and the template's own first literal.
    prefix: Box<[u8]>,
    pieces: Box<[Piece<Column>]>,
}

/// A column of the relation.
#[derive(Clone, Debug)]
pub(super) struct Column {
    /// Its place in the tuple.
    pub(super) place: usize,
    /// The OID of its type, behind all domains.
    pub(super) base: u32,
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
    /// It is longer than [`TEXT_BYTES_MAX`].
    TooLarge,
}

/// How long what a template gives may be. Redis refuses what is longer than `proto-max-bulk-len`, 512 MB by default, by
/// closing the connection.
pub const TEXT_BYTES_MAX: usize = 64 << 20;

impl BoundKey {
    /// `prefix`, then the pieces; `is_identity` says of a column's place whether it is in the replica identity.
    pub(super) fn new(prefix: &str, mut pieces: Vec<Piece<Column>>, is_identity: impl Fn(usize) -> bool) -> Self {
        let in_identity = columns(&pieces).into_iter().all(is_identity);
        let form = form(&pieces);
        let mut first = prefix.as_bytes().to_vec();
        if let Some(Piece::Literal(literal)) = pieces.first() {
            first.extend_from_slice(literal.as_bytes());
            pieces.remove(0);
        }
        BoundKey { in_identity, pattern: form.pattern(prefix), form, prefix: first.into(), pieces: pieces.into() }
    }

    /// Appends the row's key to `out`; nothing is left there unless it is [`Rendered::Done`].
    ///
    /// `row` holds one datum for each column of the relation the key was bound to. With the data of an
    /// [`crate::model::OldTuple::Key`] only a key that is [`BoundKey::in_identity`] can be rendered: there a NULL may
    /// also mean "unknown".
    pub fn render(&self, row: &[Datum<'_>], out: &mut Vec<u8>) -> Rendered {
        let start = out.len();
        out.extend_from_slice(&self.prefix);
        let rendered = match render(&self.pieces, row, out) {
            Rendered::Done if out.len() - start > TEXT_BYTES_MAX => Rendered::TooLarge,
            rendered => rendered,
        };
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

    /// The first placeholder whose text cannot be told from what stands next to it, counted from 0.
    pub(super) fn boundary(&self) -> Option<(usize, Boundary)> {
        let languages = form(&self.pieces).languages();
        let pattern = Pattern::new(&self.prefix, &languages);
        let values = (0..).zip(&self.pieces).filter(|(_, piece)| matches!(piece, Piece::Value { .. }));
        let mut boundaries = (0..).zip(values.map(|(at, _)| boundary(&self.prefix, &pattern, &languages, at)));
        boundaries.find_map(|(placeholder, found)| Some((placeholder, found?)))
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
    Boundary(Boundary),
}

/// Where a value ends depends on the reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boundary {
    /// A key (the text of a var, if it is there) with two readings.
    pub key: Vec<u8>,
    /// Whether the filter `urlencode` at this placeholder is enough to end that.
    pub encoding_helps: bool,
}

fn boundary(prefix: &[u8], pattern: &Pattern, languages: &[Language], at: usize) -> Option<Boundary> {
    let key = pattern.ambiguous_key(at)?;
    let mut encoded = languages.to_vec();
    encoded[at] = encoded[at].clone().filtered(Filter::UrlEncode);
    let encoding_helps = Pattern::new(prefix, &encoded).ambiguous_key(at).is_none();
    Some(Boundary { key, encoding_helps })
}

fn values(prefix: &[u8], pieces: &[Piece<Column>]) -> Vec<KeyValue> {
    let languages: Vec<Language> = form(pieces).languages();
    let pattern = Pattern::new(prefix, &languages);
    let boundary = |at: usize| boundary(prefix, &pattern, &languages, at).map(Lost::Boundary);
    let mut found = Vec::new();
    let mut placeholder = 0;
    for (at, piece) in pieces.iter().enumerate() {
        let Piece::Value { source, default, filters } = piece else { continue };
        let filter = filters.iter().find(|filter| !filter.is_injective()).map(|filter| Lost::Filter(*filter));
        let lost = filter.or_else(|| default.as_ref().map(|_| Lost::Default)).or_else(|| boundary(at));
        match source {
            Source::Column(column) => found.push(KeyValue { placeholder, columns: vec![column.place], lost }),
            Source::Var(inner) => {
                let of_var = |value: KeyValue| KeyValue { placeholder, lost: lost.clone().or(value.lost), ..value };
                found.extend(values(b"", inner).into_iter().map(of_var));
            }
        }
        placeholder += 1;
    }
    found
}

fn form(pieces: &[Piece<Column>]) -> KeyForm {
    KeyForm::new(pieces, |column| column.base)
}

/// The places of the columns that the pieces use, each once, in ascending order.
fn columns(pieces: &[Piece<Column>]) -> Vec<usize> {
    let of_piece = |piece: &Piece<Column>| match piece {
        Piece::Literal(_) => Vec::new(),
        Piece::Value { source: Source::Column(column), .. } => vec![column.place],
        Piece::Value { source: Source::Var(inner), .. } => columns(inner),
    };
    let mut places: Vec<usize> = pieces.iter().flat_map(of_piece).collect();
    places.sort_unstable();
    places.dedup();
    places
}

fn render(pieces: &[Piece<Column>], row: &[Datum<'_>], out: &mut Vec<u8>) -> Rendered {
    for piece in pieces {
        match piece {
            Piece::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Piece::Value { source, default, filters } => {
                let start = out.len();
                match (render_source(source, row, out), default) {
                    (Rendered::Done, _) => {}
                    (Rendered::Null, Some(default)) => {
                        out.truncate(start);
                        out.extend_from_slice(default.as_bytes());
                    }
                    (incomplete, _) => return incomplete,
                }
                for filter in filters {
                    filter.apply(out, start);
                }
            }
        }
    }
    Rendered::Done
}

fn render_source(source: &Source<Column>, row: &[Datum<'_>], out: &mut Vec<u8>) -> Rendered {
    match source {
        Source::Var(pieces) => render(pieces, row, out),
        Source::Column(column) => match row.get(column.place) {
            Some(Datum::Text(bytes)) => {
                out.extend_from_slice(bytes);
                Rendered::Done
            }
            Some(Datum::Null) => Rendered::Null,
            Some(Datum::UnchangedToast) | None => Rendered::Unknown,
        },
    }
}
