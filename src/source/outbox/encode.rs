//! Rows of the outbox as messages of pgoutput, so that nothing behind the source knows the difference; pure.
//!
//! The layout is that of "Logical Replication Message Formats"; what is read there is written here, in the same words
//! ([`crate::decode::pgoutput`]).

use crate::model::{Lsn, Relation, ReplicaIdentity, Timestamp, Xid};

/// Messages, one behind the other, each with its length before it.
#[derive(Debug, Default)]
pub struct Frames {
    bytes: Vec<u8>,
}

/// What a table looked like when a row was written to the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The columns that are stored.
    pub relation: Relation,
    /// The places of those that an old image has, in its order, where it has not all.
    pub identity: Vec<usize>,
    /// Old images have all columns.
    pub is_full: bool,
}

/// A row of the outbox that says what became of a row. Its images are texts of rows, as Postgres writes them.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the columns")]
pub struct Row<'r> {
    pub op: u8,
    pub doubt: bool,
    pub gone: &'r [i16],
    pub old: Option<&'r [u8]>,
    pub new: Option<&'r [u8]>,
}

impl Row<'_> {
    fn is_gone(&self, place: usize) -> bool {
        is_gone(self.gone, place)
    }
}

/// Whether the place, which SQL counts from 1, says nothing.
fn is_gone(gone: &[i16], place: usize) -> bool {
    gone.iter().any(|one| usize::try_from(*one) == Ok(place + 1))
}

/// A row of the outbox makes no sense. Says what, never what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidImage {
    /// It does not begin and end as the text of a row does.
    #[error("an image is not the text of a row")]
    NotARow,
    /// It has another number of columns.
    #[error("an image has more or fewer columns than its table")]
    Columns,
    /// More than the format has room for.
    #[error("an image is larger than a row can be")]
    TooLarge,
    /// It lacks an image, or is of no kind that is known.
    #[error("it is of no kind that is known")]
    Operation,
}

type Result<T> = std::result::Result<T, InvalidImage>;

impl Frames {
    /// How many bytes they take up.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The message at `from`, and where the next one begins; `None` behind the last.
    pub fn at(&self, from: usize) -> Option<(&[u8], usize)> {
        let (length, rest) = self.bytes.get(from..)?.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        Some((rest.get(..length)?, from + 4 + length))
    }

    /// A transaction begins, or goes on with what another one did in it.
    pub fn begin(&mut self, commit_lsn: Lsn, commit_time: Timestamp, Xid(xid): Xid) {
        let message = self.open(b'B');
        self.bytes.extend_from_slice(&commit_lsn.0.to_be_bytes());
        self.bytes.extend_from_slice(&commit_time.0.to_be_bytes());
        self.bytes.extend_from_slice(&xid.to_be_bytes());
        self.close(message);
    }

    /// It ends.
    pub fn commit(&mut self, commit_lsn: Lsn, end_lsn: Lsn, commit_time: Timestamp) {
        let message = self.open(b'C');
        self.bytes.push(0);
        self.bytes.extend_from_slice(&commit_lsn.0.to_be_bytes());
        self.bytes.extend_from_slice(&end_lsn.0.to_be_bytes());
        self.bytes.extend_from_slice(&commit_time.0.to_be_bytes());
        self.close(message);
    }

    /// A table's shape.
    pub fn relation(&mut self, relation: &Relation) {
        let message = self.open(b'R');
        self.bytes.extend_from_slice(&relation.oid.to_be_bytes());
        self.string(if relation.schema == "pg_catalog" { "" } else { &relation.schema });
        self.string(&relation.name);
        self.bytes.push(match relation.identity {
            ReplicaIdentity::Default => b'd',
            ReplicaIdentity::Nothing => b'n',
            ReplicaIdentity::Full => b'f',
            ReplicaIdentity::Index => b'i',
        });
        // Postgres allows 1600 columns.
        self.bytes.extend_from_slice(&(relation.columns.len() as u16).to_be_bytes());
        for column in &relation.columns {
            self.bytes.push(u8::from(column.identity));
            self.string(&column.name);
            self.bytes.extend_from_slice(&column.type_oid.to_be_bytes());
            self.bytes.extend_from_slice(&column.type_modifier.to_be_bytes());
        }
        self.close(message);
    }

    /// What became of a row.
    pub fn row(&mut self, shape: &Shape, row: &Row<'_>) -> Result<()> {
        let old = |frames: &mut Self, old: &[u8]| frames.old(shape, old, row.gone);
        let unclear = |place: usize| !shape.relation.columns[place].identity || row.is_gone(place);
        match (row.op, row.old, row.new) {
            // Of what the row is now nothing but its name is known: it is deleted, and read again.
            (b'i' | b'u' | b'd', before, after) if row.doubt => {
                if let Some(before) = before {
                    self.change(b'D', shape, |frames| old(frames, before))?;
                }
                self.change(b'I', shape, |frames| match (after, before) {
                    (Some(after), _) => frames.whole(b'N', shape, after, unclear),
                    (None, Some(before)) if shape.is_full => frames.whole(b'N', shape, before, unclear),
                    (None, Some(before)) => frames.identity(b'N', b'u', shape, before, row.gone),
                    (None, None) => Err(InvalidImage::NotARow),
                })
            }
            (b'i', None, Some(new)) => {
                self.change(b'I', shape, |frames| frames.whole(b'N', shape, new, |place| row.is_gone(place)))
            }
            (b'u', before, Some(new)) => self.change(b'U', shape, |frames| {
                before.map_or(Ok(()), |before| old(frames, before))?;
                frames.whole(b'N', shape, new, |place| row.is_gone(place))
            }),
            (b'd', Some(before), None) => self.change(b'D', shape, |frames| old(frames, before)),
            _ => Err(InvalidImage::Operation),
        }
    }

    /// A table was emptied.
    pub fn truncate(&mut self, relation: u32) {
        let message = self.open(b'T');
        self.bytes.extend_from_slice(&1_u32.to_be_bytes());
        self.bytes.push(0);
        self.bytes.extend_from_slice(&relation.to_be_bytes());
        self.close(message);
    }

    /// A message of somebody's.
    pub fn message(&mut self, lsn: Lsn, prefix: &str, content: &[u8]) -> Result<()> {
        let length = i32::try_from(content.len()).map_err(|_| InvalidImage::TooLarge)?;
        let message = self.open(b'M');
        self.bytes.push(1);
        self.bytes.extend_from_slice(&lsn.0.to_be_bytes());
        self.string(prefix);
        self.bytes.extend_from_slice(&length.to_be_bytes());
        self.bytes.extend_from_slice(content);
        self.close(message);
        Ok(())
    }

    /// Begins a message, and gives where.
    fn open(&mut self, kind: u8) -> usize {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0, 0, 0, kind]);
        begin
    }

    fn close(&mut self, begin: usize) {
        // Two images of at most 1 GiB each: `inner` has looked.
        let length = (self.bytes.len() - begin - 4) as u32;
        self.bytes[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
    }

    fn change(&mut self, kind: u8, shape: &Shape, images: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let begin = self.open(kind);
        self.bytes.extend_from_slice(&shape.relation.oid.to_be_bytes());
        images(self)?;
        self.close(begin);
        Ok(())
    }

    fn string(&mut self, text: &str) {
        // Postgres's names hold no NUL.
        self.bytes.extend(text.bytes().filter(|byte| *byte != 0));
        self.bytes.push(0);
    }

    /// What a row was, all of it or only what identifies it.
    fn old(&mut self, shape: &Shape, old: &[u8], gone: &[i16]) -> Result<()> {
        match shape.is_full {
            true => self.whole(b'O', shape, old, |place| is_gone(gone, place)),
            false => self.identity(b'K', b'n', shape, old, gone),
        }
    }

    /// A row of all columns; of some of them it does not say what they are.
    fn whole(&mut self, kind: u8, shape: &Shape, row: &[u8], unknown: impl Fn(usize) -> bool) -> Result<()> {
        self.image(kind, shape);
        let mut rest = Some(inner(row)?);
        for place in 0..shape.relation.columns.len() {
            let begin = self.bytes.len();
            rest = self.column(rest.ok_or(InvalidImage::Columns)?)?;
            if unknown(place) {
                self.bytes.truncate(begin);
                self.bytes.push(b'u');
            }
        }
        rest.is_none().then_some(()).ok_or(InvalidImage::Columns)
    }

    /// A row of the identity's columns; all others are `others`.
    fn identity(&mut self, kind: u8, others: u8, shape: &Shape, row: &[u8], gone: &[i16]) -> Result<()> {
        let begin = self.bytes.len();
        let mut ends = Vec::with_capacity(shape.identity.len());
        let mut rest = Some(inner(row)?);
        for _ in &shape.identity {
            rest = self.column(rest.ok_or(InvalidImage::Columns)?)?;
            ends.push(self.bytes.len() - begin);
        }
        if rest.is_some() {
            return Err(InvalidImage::Columns);
        }
        let read = self.bytes.split_off(begin);
        self.image(kind, shape);
        for place in 0..shape.relation.columns.len() {
            match shape.identity.iter().position(|own| *own == place) {
                Some(_) if is_gone(gone, place) => self.bytes.push(b'u'),
                Some(nth) => {
                    let from = if nth == 0 { 0 } else { ends[nth - 1] };
                    self.bytes.extend_from_slice(&read[from..ends[nth]]);
                }
                None => self.bytes.push(others),
            }
        }
        Ok(())
    }

    fn image(&mut self, kind: u8, shape: &Shape) {
        self.bytes.push(kind);
        // Postgres allows 1600 columns.
        self.bytes.extend_from_slice(&(shape.relation.columns.len() as u16).to_be_bytes());
    }

    /// The first column of what is left of a row; gives what follows its comma.
    fn column<'r>(&mut self, field: &'r [u8]) -> Result<Option<&'r [u8]>> {
        if matches!(field.first(), None | Some(b',')) {
            self.bytes.push(b'n');
            return Ok(field.get(1..));
        }
        self.bytes.push(b't');
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        let after = if field.first() == Some(&b'"') {
            self.quoted(&field[1..])?
        } else {
            let end = field.iter().position(|byte| *byte == b',').unwrap_or(field.len());
            self.bytes.extend_from_slice(&field[..end]);
            &field[end..]
        };
        let length = (self.bytes.len() - begin - 4) as u32;
        self.bytes[begin..begin + 4].copy_from_slice(&length.to_be_bytes());
        match after.split_first() {
            None => Ok(None),
            Some((b',', rest)) => Ok(Some(rest)),
            Some(_) => Err(InvalidImage::NotARow),
        }
    }

    /// Up to the closing quote; gives what follows it.
    fn quoted<'r>(&mut self, mut rest: &'r [u8]) -> Result<&'r [u8]> {
        loop {
            let plain = rest.iter().position(|byte| matches!(byte, b'"' | b'\\')).ok_or(InvalidImage::NotARow)?;
            self.bytes.extend_from_slice(&rest[..plain]);
            let mark = rest[plain];
            rest = &rest[plain + 1..];
            match (mark, rest.first()) {
                (b'"', Some(b'"')) => self.bytes.push(b'"'),
                (b'"', _) => return Ok(rest),
                (_, Some(escaped)) => self.bytes.push(*escaped),
                (_, None) => return Err(InvalidImage::NotARow),
            }
            rest = &rest[1..];
        }
    }
}

/// The columns of a row that Postgres has written as text (`record_out` in `src/backend/utils/adt/rowtypes.c`): a NULL is
/// nothing at all, quotes and backslashes within quotes are doubled.
fn inner(row: &[u8]) -> Result<&[u8]> {
    if row.len() > i32::MAX as usize / 2 {
        return Err(InvalidImage::TooLarge);
    }
    row.strip_prefix(b"(").and_then(|row| row.strip_suffix(b")")).ok_or(InvalidImage::NotARow)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;
    use crate::decode::pgoutput::parse;
    use crate::model::{Change, Column, Datum, Event, OldTuple, Tuple};

    fn each(frames: &Frames) -> Vec<Event<'_>> {
        let mut from = 0;
        let mut events = Vec::new();
        while let Some((frame, next)) = frames.at(from) {
            events.push(parse(frame).unwrap());
            from = next;
        }
        assert_eq!(from, frames.len());
        events
    }

    fn datums(tuple: Tuple<'_>) -> Vec<Option<String>> {
        let text = |datum| match datum {
            Datum::Null => None,
            Datum::Text(text) => Some(String::from_utf8(text.to_vec()).unwrap()),
            Datum::UnchangedToast => panic!("the outbox has all of a row"),
        };
        tuple.datums().map(text).collect()
    }

    /// Of so many columns, of which the last and the first identify a row.
    fn shape(columns: usize, is_full: bool) -> Shape {
        let identity = if columns > 1 { vec![columns - 1, 0] } else { vec![0] };
        let column = |place| Column {
            name: format!("c{place}"),
            type_oid: 25,
            type_modifier: -1,
            identity: identity.contains(&place),
        };
        let relation = Relation {
            oid: 7,
            schema: "shop".into(),
            name: "things".into(),
            identity: if is_full { ReplicaIdentity::Full } else { ReplicaIdentity::Index },
            columns: (0..columns).map(column).collect(),
        };
        Shape { relation, identity, is_full }
    }

    const NEW: Row<'_> = Row { op: b'i', doubt: false, gone: &[], old: None, new: None };

    fn insert(columns: usize, row: &str) -> Result<Vec<Option<String>>> {
        let mut frames = Frames::default();
        frames.row(&shape(columns, true), &Row { new: Some(row.as_bytes()), ..NEW })?;
        match each(&frames)[..] {
            [Event::Change { relation: 7, change: Change::Insert { new } }] => Ok(datums(new)),
            ref other => panic!("{other:?}"),
        }
    }

    /// What a row comes to: `-` is NULL, `?` is unknown.
    fn shown(is_full: bool, row: &Row<'_>) -> Vec<String> {
        let tuple = |tuple: Tuple<'_>| {
            let text = |datum| match datum {
                Datum::Null => "-".to_owned(),
                Datum::UnchangedToast => "?".to_owned(),
                Datum::Text(text) => String::from_utf8_lossy(text).into_owned(),
            };
            tuple.datums().map(text).collect::<Vec<_>>().join(" ")
        };
        let old = |old| match old {
            OldTuple::Key(key) => format!("key {}", tuple(key)),
            OldTuple::Full(full) => format!("full {}", tuple(full)),
        };
        let mut frames = Frames::default();
        frames.row(&shape(3, is_full), row).unwrap();
        let shown = each(&frames).into_iter().map(|event| match event {
            Event::Change { change: Change::Insert { new }, .. } => format!("insert {}", tuple(new)),
            Event::Change { change: Change::Update { old: None, new }, .. } => format!("update {}", tuple(new)),
            Event::Change { change: Change::Update { old: Some(before), new }, .. } => {
                format!("update {} to {}", old(before), tuple(new))
            }
            Event::Change { change: Change::Delete { old: before }, .. } => format!("delete {}", old(before)),
            other => panic!("{other:?}"),
        });
        shown.collect()
    }

    #[test]
    fn everything_that_is_written_is_read_again() {
        let relation = Relation {
            oid: 7,
            schema: "shop".into(),
            name: "bücher".into(),
            identity: ReplicaIdentity::Full,
            columns: vec![Column { name: "id".into(), type_oid: 23, type_modifier: -1, identity: true }],
        };
        let in_catalog = Relation { schema: "pg_catalog".into(), columns: Vec::new(), ..relation.clone() };
        let mut frames = Frames::default();
        frames.relation(&relation);
        frames.relation(&in_catalog);
        frames.begin(Lsn(9), Timestamp(5), Xid(3));
        frames.truncate(7);
        frames.message(Lsn(9), "keepstep", b"marker").unwrap();
        frames.commit(Lsn(9), Lsn(10), Timestamp(5));
        let message = Event::Message { transactional: true, lsn: Lsn(9), prefix: b"keepstep", content: b"marker" };
        assert_eq!(
            each(&frames),
            [
                Event::Relation(relation),
                Event::Relation(in_catalog),
                Event::Begin { commit_lsn: Lsn(9), commit_time: Timestamp(5), xid: Xid(3) },
                Event::Truncate { relations: vec![7] },
                message,
                Event::Commit { commit_lsn: Lsn(9), end_lsn: Lsn(10) },
            ]
        );
    }

    #[test]
    fn changes_have_their_images() {
        let (new, key, full) = (Some(&b"(a,b,c)"[..]), Some(&b"(z,x)"[..]), Some(&b"(x,,z)"[..]));
        let update = Row { op: b'u', new, ..NEW };
        let delete = Row { op: b'd', ..NEW };
        assert_eq!(shown(false, &Row { new, ..NEW }), ["insert a b c"]);
        assert_eq!(shown(false, &update), ["update a b c"]);
        assert_eq!(shown(false, &Row { old: key, ..update }), ["update key x - z to a b c"]);
        assert_eq!(shown(true, &Row { old: full, ..update }), ["update full x - z to a b c"]);
        assert_eq!(shown(false, &Row { old: key, ..delete }), ["delete key x - z"]);
        assert_eq!(shown(true, &Row { old: full, ..delete }), ["delete full x - z"]);
        let mut frames = Frames::default();
        for row in [Row { new: None, ..NEW }, delete, Row { op: b'x', new, ..NEW }, Row { old: key, new, ..delete }] {
            assert!(frames.row(&shape(3, true), &row).is_err(), "{row:?}");
        }
    }

    #[test]
    fn what_a_row_does_not_say_is_unknown() {
        let (new, key, full) = (Some(&b"(a,b,c)"[..]), Some(&b"(z,x)"[..]), Some(&b"(x,y,z)"[..]));
        let update = Row { op: b'u', new, gone: &[2], ..NEW };
        assert_eq!(shown(false, &Row { new, gone: &[2, 3], ..NEW }), ["insert a ? ?"]);
        assert_eq!(shown(false, &Row { old: key, ..update }), ["update key x - z to a ? c"]);
        assert_eq!(shown(true, &Row { old: full, gone: &[1], ..update }), ["update full ? y z to ? b c"]);
        // In doubt a row is deleted, and read again by what identifies it.
        let doubt = Row { doubt: true, gone: &[], ..update };
        assert_eq!(shown(false, &doubt), ["insert a ? c"]);
        assert_eq!(shown(false, &Row { old: key, ..doubt }), ["delete key x - z", "insert a ? c"]);
        let deleted = Row { op: b'd', new: None, ..doubt };
        assert_eq!(shown(false, &Row { old: key, ..deleted }), ["delete key x - z", "insert x ? z"]);
        assert_eq!(shown(true, &Row { old: full, ..deleted }), ["delete full x y z", "insert x ? z"]);
    }

    #[test]
    fn rows_are_read_as_postgres_writes_them() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(insert(3, "(1,,\"\")"), Ok(vec![some("1"), None, some("")]));
        assert_eq!(insert(1, "()"), Ok(vec![None]));
        assert_eq!(insert(2, "(,)"), Ok(vec![None, None]));
        assert_eq!(insert(2, r#"("a ""b"", \\c)","(x,y)")"#), Ok(vec![some(r#"a "b", \c)"#), some("(x,y)")]));
        assert_eq!(insert(1, "(\"a\nb\")"), Ok(vec![some("a\nb")]));
    }

    #[test]
    fn what_is_no_row_of_the_table_is_refused() {
        for row in ["", "1", "(1", "1)", "(\"1)", "(\"a\"b)", "(\"a\\"] {
            assert_eq!(insert(1, row), Err(InvalidImage::NotARow), "{row}");
        }
        assert_eq!(insert(1, "(1,2)"), Err(InvalidImage::Columns));
        assert_eq!(insert(3, "(1,2)"), Err(InvalidImage::Columns));
    }

    /// As `record_out` does it.
    fn written(row: &[Option<String>]) -> String {
        let special = |c: char| matches!(c, '"' | '\\' | '(' | ')' | ',') || c.is_ascii_whitespace() || c == '\u{b}';
        let column = |text: &Option<String>| match text {
            None => String::new(),
            Some(text) if text.is_empty() || text.contains(special) => {
                format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\"\""))
            }
            Some(text) => text.clone(),
        };
        format!("({})", row.iter().map(column).collect::<Vec<_>>().join(","))
    }

    proptest! {
        #[test]
        fn any_row_comes_through(row in proptest::collection::vec(proptest::option::of(".{0,9}|[\"\\\\(), a]{0,9}"), 1..6)) {
            prop_assert_eq!(insert(row.len(), &written(&row)), Ok(row));
        }

        #[test]
        fn any_bytes_give_an_answer(
            image in proptest::collection::vec(any::<u8>(), 0..40),
            columns in 1_usize..4,
            is_full: bool,
            doubt: bool,
        ) {
            let row = Row { op: b'u', doubt, gone: &[1], old: Some(&image), new: Some(&image) };
            let mut frames = Frames::default();
            if frames.row(&shape(columns, is_full), &row).is_ok() {
                each(&frames);
            }
        }
    }
}
