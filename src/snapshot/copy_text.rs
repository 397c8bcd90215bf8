//! A line of COPY's text format as the columns of a row; pure.
//!
//! Columns are the types' output functions' text, as in the stream, with the escapes of `CopyAttributeOutText`
//! (`src/backend/commands/copyto.c`); the manual's "COPY", "Text Format".

use std::ops::Range;

use crate::model::Datum;

/// A line is not what COPY writes for so many columns. Never says what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLine {
    /// It does not end with a line feed.
    #[error("a COPY line does not end")]
    Unended,
    /// A backslash with nothing, or with something unknown, behind it.
    #[error("a COPY line holds an unknown escape")]
    Escape,
    /// More or fewer columns.
    #[error("a COPY line has {found} columns instead of {expected}")]
    Columns {
        /// In the line.
        found: usize,
        /// In the query.
        expected: usize,
    },
}

/// One row at a time; the buffers live on from row to row.
#[derive(Debug, Default)]
pub struct Row {
    bytes: Vec<u8>,
    /// `None` is NULL.
    columns: Vec<Option<Range<usize>>>,
}

impl Row {
    /// Reads a line of so many columns.
    ///
    /// # Errors
    /// [`InvalidLine`]; the row is empty then.
    pub fn read(&mut self, line: &[u8], columns: usize) -> Result<(), InvalidLine> {
        self.bytes.clear();
        self.columns.clear();
        let read = self.read_columns(line, columns);
        if read.is_err() {
            self.columns.clear();
        }
        read
    }

    fn read_columns(&mut self, line: &[u8], columns: usize) -> Result<(), InvalidLine> {
        let line = line.strip_suffix(b"\n").ok_or(InvalidLine::Unended)?;
        // A table without columns has lines without any.
        if columns > 0 || !line.is_empty() {
            for column in line.split(|&byte| byte == b'\t') {
                let range = self.unescape(column)?;
                self.columns.push(range);
            }
        }
        match self.columns.len() {
            found if found == columns => Ok(()),
            found => Err(InvalidLine::Columns { found, expected: columns }),
        }
    }

    fn unescape(&mut self, mut text: &[u8]) -> Result<Option<Range<usize>>, InvalidLine> {
        if text == b"\\N" {
            return Ok(None);
        }
        let start = self.bytes.len();
        while let Some(plain) = text.iter().position(|&byte| byte == b'\\') {
            self.bytes.extend_from_slice(&text[..plain]);
            self.bytes.push(match text.get(plain + 1) {
                Some(b'b') => 0x08,
                Some(b'f') => 0x0c,
                Some(b'n') => b'\n',
                Some(b'r') => b'\r',
                Some(b't') => b'\t',
                Some(b'v') => 0x0b,
                Some(b'\\') => b'\\',
                _ => return Err(InvalidLine::Escape),
            });
            text = &text[plain + 2..];
        }
        self.bytes.extend_from_slice(text);
        Ok(Some(start..self.bytes.len()))
    }

    /// Its columns.
    pub fn datums(&self) -> impl Iterator<Item = Datum<'_>> {
        self.columns.iter().map(|column| match column {
            None => Datum::Null,
            Some(range) => Datum::Text(&self.bytes[range.clone()]),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(line: &[u8], columns: usize) -> Result<Vec<Option<Vec<u8>>>, InvalidLine> {
        let mut row = Row::default();
        row.read(line, columns)?;
        let owned = |datum| match datum {
            Datum::Text(text) => Some(text.to_vec()),
            _ => None,
        };
        Ok(row.datums().map(owned).collect())
    }

    #[test]
    fn escapes_and_nulls_are_read() {
        let line = b"1\t\\N\t\ta\\tb\\\\N\\n\\r\\b\\f\\v\n";
        let expected = [Some(&b"1"[..]), None, Some(b""), Some(b"a\tb\\N\n\r\x08\x0c\x0b")];
        assert_eq!(read(line, 4), Ok(expected.map(|column| column.map(<[u8]>::to_vec)).to_vec()));
        assert_eq!(read(b"\n", 0), Ok(vec![]));
        assert_eq!(read(b"\n", 1), Ok(vec![Some(vec![])]));
    }

    #[test]
    fn other_lines_are_errors() {
        assert_eq!(read(b"1\t2", 2), Err(InvalidLine::Unended));
        assert_eq!(read(b"1\t2\n", 3), Err(InvalidLine::Columns { found: 2, expected: 3 }));
        assert_eq!(read(b"\\x41\n", 1), Err(InvalidLine::Escape));
        assert_eq!(read(b"a\\\n", 1), Err(InvalidLine::Escape));
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(line in proptest::collection::vec(any::<u8>(), 0..64), columns in 0_usize..4) {
            let _ = read(&line, columns);
        }

        #[test]
        fn what_copy_writes_is_read_back(rows in proptest::collection::vec(proptest::option::of(".*"), 1..4)) {
            let escape = |text: &Option<String>| match text {
                None => "\\N".to_owned(),
                Some(text) => text.replace('\\', "\\\\").replace('\t', "\\t").replace('\n', "\\n").replace('\r', "\\r"),
            };
            let line = rows.iter().map(escape).collect::<Vec<_>>().join("\t") + "\n";
            let expected = rows.iter().map(|text| text.clone().map(String::into_bytes)).collect();
            prop_assert_eq!(read(line.as_bytes(), rows.len()), Ok(expected));
        }
    }
}
