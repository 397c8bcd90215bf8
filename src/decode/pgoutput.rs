//! The pgoutput messages of protocol version 1, as slices of the frame they came in.
//!
//! The layout is that of the pages "Logical Replication Message Formats" and "Logical Streaming Replication
//! Parameters" of Postgres's documentation (`src/backend/replication/logical/proto.c`). A message is read to its last
//! byte or refused: what is cut short, left over or unknown is a [`DecodeError`], never a guess and never a panic.
//! Tuples are checked here once, so that walking over their columns later cannot fail; a row change allocates nothing.

use crate::model::{Change, Column, Datum, Event, Lsn, OldTuple, Relation, ReplicaIdentity, Timestamp, Tuple, Xid};

/// A frame is not a pgoutput message. Says what and where, never what a row holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// There is not even a message type.
    #[error("empty pgoutput message")]
    Empty,
    /// Protocol version 1 has no such message.
    #[error("pgoutput message of unknown type {0:#04x}")]
    UnknownMessage(u8),
    /// The type is known, the rest does not fit it.
    #[error("pgoutput {message} message, byte {offset}: {fault}")]
    Malformed {
        /// The message's name in Postgres's documentation.
        message: &'static str,
        /// Where reading stopped, in bytes from the beginning of the frame.
        offset: usize,
        /// What is wrong there.
        fault: Fault,
    },
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The frame ends inside it.
    #[error("it ends too early")]
    Truncated,
    /// The frame goes on behind it.
    #[error("{0} bytes are left over")]
    Trailing(usize),
    /// A count or a length is below zero.
    #[error("the {0} is negative")]
    Negative(&'static str),
    /// A byte that chooses between forms chooses none that is known.
    #[error("unknown {what} {byte:#04x}")]
    Unknown {
        /// What the byte says.
        what: &'static str,
        /// The byte.
        byte: u8,
    },
    /// A column came in binary form, which was not asked for.
    #[error("a column is in binary form, which was not requested")]
    Binary,
    /// A name is not UTF-8, although `client_encoding` is.
    #[error("a name is not UTF-8")]
    NotUtf8,
}

/// Reads one message: what stands behind the header of an XLogData frame, to its end.
pub fn parse(frame: &[u8]) -> Result<Event<'_>, DecodeError> {
    let (&kind, body) = frame.split_first().ok_or(DecodeError::Empty)?;
    let mut reader = Reader { rest: body };
    let (message, event) = match kind {
        b'I' => ("Insert", insert(&mut reader)),
        b'U' => ("Update", update(&mut reader)),
        b'D' => ("Delete", delete(&mut reader)),
        b'B' => ("Begin", begin(&mut reader)),
        b'C' => ("Commit", commit(&mut reader)),
        b'R' => ("Relation", relation(&mut reader)),
        b'T' => ("Truncate", truncate(&mut reader)),
        b'M' => ("Message", logical_message(&mut reader)),
        b'O' => ("Origin", origin(&mut reader)),
        b'Y' => ("Type", type_name(&mut reader)),
        unknown => return Err(DecodeError::UnknownMessage(unknown)),
    };
    let complete = event.and_then(|event| match reader.rest.len() {
        0 => Ok(event),
        left => Err(Fault::Trailing(left)),
    });
    complete.map_err(|fault| DecodeError::Malformed { message, offset: frame.len() - reader.rest.len(), fault })
}

fn insert<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    let relation = reader.u32()?;
    match reader.byte()? {
        b'N' => Ok(Event::Change { relation, change: Change::Insert { new: reader.tuple()? } }),
        byte => Err(Fault::Unknown { what: "tuple kind", byte }),
    }
}

fn update<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    let relation = reader.u32()?;
    let (old, new_kind) = match reader.byte()? {
        b'K' => (Some(OldTuple::Key(reader.tuple()?)), reader.byte()?),
        b'O' => (Some(OldTuple::Full(reader.tuple()?)), reader.byte()?),
        kind => (None, kind),
    };
    match new_kind {
        b'N' => Ok(Event::Change { relation, change: Change::Update { old, new: reader.tuple()? } }),
        byte => Err(Fault::Unknown { what: "tuple kind", byte }),
    }
}

fn delete<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    let relation = reader.u32()?;
    let old = match reader.byte()? {
        b'K' => OldTuple::Key(reader.tuple()?),
        b'O' => OldTuple::Full(reader.tuple()?),
        byte => return Err(Fault::Unknown { what: "tuple kind", byte }),
    };
    Ok(Event::Change { relation, change: Change::Delete { old } })
}

fn begin<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    Ok(Event::Begin { commit_lsn: reader.lsn()?, commit_time: reader.timestamp()?, xid: Xid(reader.u32()?) })
}

fn commit<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    reader.flags(0)?;
    let (commit_lsn, end_lsn) = (reader.lsn()?, reader.lsn()?);
    reader.timestamp()?;
    Ok(Event::Commit { commit_lsn, end_lsn })
}

fn relation<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    let oid = reader.u32()?;
    let schema = match reader.text()? {
        "" => "pg_catalog",
        schema => schema,
    };
    let name = reader.text()?;
    let byte = reader.byte()?;
    let identity = ReplicaIdentity::from_catalog(byte).ok_or(Fault::Unknown { what: "replica identity", byte })?;
    let columns = (0..reader.column_count()?).map(|_| column(reader)).collect::<Result<_, _>>()?;
    Ok(Event::Relation(Relation { oid, schema: schema.to_owned(), name: name.to_owned(), identity, columns }))
}

fn column(reader: &mut Reader<'_>) -> Result<Column, Fault> {
    const PART_OF_IDENTITY: u8 = 1;
    let identity = reader.flags(PART_OF_IDENTITY)? == PART_OF_IDENTITY;
    let name = reader.text()?.to_owned();
    Ok(Column { name, type_oid: reader.u32()?, type_modifier: reader.i32()?, identity })
}

fn truncate<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    const CASCADE_AND_RESTART_IDENTITY: u8 = 1 | 2;
    let count = reader.length("relation count")?;
    reader.flags(CASCADE_AND_RESTART_IDENTITY)?;
    // No capacity from the count: it is checked by nothing but the bytes that follow.
    let relations = (0..count).map(|_| reader.u32()).collect::<Result<_, _>>()?;
    Ok(Event::Truncate { relations })
}

fn logical_message<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    const TRANSACTIONAL: u8 = 1;
    let transactional = reader.flags(TRANSACTIONAL)? == TRANSACTIONAL;
    let (lsn, prefix) = (reader.lsn()?, reader.string()?);
    let length = reader.length("content length")?;
    Ok(Event::Message { transactional, lsn, prefix, content: reader.take(length)? })
}

fn origin<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    reader.lsn()?;
    reader.string()?;
    Ok(Event::Other)
}

fn type_name<'a>(reader: &mut Reader<'a>) -> Result<Event<'a>, Fault> {
    reader.u32()?;
    reader.string()?;
    reader.string()?;
    Ok(Event::Other)
}

impl<'a> Tuple<'a> {
    /// Its columns, in the order of [`Relation::columns`].
    pub fn datums(self) -> Datums<'a> {
        Datums { left: self.columns, reader: Reader { rest: self.bytes } }
    }

    /// Fills `datums` with its columns, and nothing else.
    pub fn read_into(self, datums: &mut Vec<Datum<'a>>) {
        datums.clear();
        datums.extend(self.datums());
    }
}

/// The columns of a tuple, one after the other.
#[derive(Clone, Debug)]
pub struct Datums<'a> {
    left: u16,
    reader: Reader<'a>,
}

impl<'a> Iterator for Datums<'a> {
    type Item = Datum<'a>;

    fn next(&mut self) -> Option<Datum<'a>> {
        self.left = self.left.checked_sub(1)?;
        // `parse` has read the same bytes with the same function, so this cannot end early.
        self.reader.datum().ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (usize::from(self.left), Some(usize::from(self.left)))
    }
}

impl ExactSizeIterator for Datums<'_> {}

/// What is left to read of a message. Numbers are big-endian.
#[derive(Clone, Debug)]
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(Fault::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Fault::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn byte(&mut self) -> Result<u8, Fault> {
        self.array().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        self.array().map(u32::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32, Fault> {
        self.array().map(i32::from_be_bytes)
    }

    fn lsn(&mut self) -> Result<Lsn, Fault> {
        self.array().map(|bytes| Lsn(u64::from_be_bytes(bytes)))
    }

    fn timestamp(&mut self) -> Result<Timestamp, Fault> {
        self.array().map(|bytes| Timestamp(i64::from_be_bytes(bytes)))
    }

    /// An Int32 that counts what follows.
    fn length(&mut self, what: &'static str) -> Result<usize, Fault> {
        usize::try_from(self.i32()?).map_err(|_| Fault::Negative(what))
    }

    fn column_count(&mut self) -> Result<u16, Fault> {
        let count = self.array().map(i16::from_be_bytes)?;
        u16::try_from(count).map_err(|_| Fault::Negative("column count"))
    }

    /// A byte of flags of which only `known` ones may be set.
    fn flags(&mut self, known: u8) -> Result<u8, Fault> {
        match self.byte()? {
            flags if flags & !known == 0 => Ok(flags),
            byte => Err(Fault::Unknown { what: "flags", byte }),
        }
    }

    /// A String: bytes up to a NUL.
    fn string(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.rest.iter().position(|&byte| byte == 0).ok_or(Fault::Truncated)?;
        let string = self.take(length)?;
        self.take(1)?;
        Ok(string)
    }

    fn text(&mut self) -> Result<&'a str, Fault> {
        str::from_utf8(self.string()?).map_err(|_| Fault::NotUtf8)
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, Fault> {
        let columns = self.column_count()?;
        let begin = self.rest;
        for _ in 0..columns {
            self.datum()?;
        }
        Ok(Tuple { columns, bytes: &begin[..begin.len() - self.rest.len()] })
    }

    fn datum(&mut self) -> Result<Datum<'a>, Fault> {
        match self.byte()? {
            b'n' => Ok(Datum::Null),
            b'u' => Ok(Datum::UnchangedToast),
            b't' => {
                let length = self.length("length of a column")?;
                self.take(length).map(Datum::Text)
            }
            b'b' => Err(Fault::Binary),
            byte => Err(Fault::Unknown { what: "column kind", byte }),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const TUPLE: &[u8] = b"\0\x04t\0\0\0\x0212nut\0\0\0\0";
    const TUPLE_DATUMS: [Datum<'_>; 4] = [Datum::Text(b"12"), Datum::Null, Datum::UnchangedToast, Datum::Text(b"")];

    fn frame(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    fn tuple() -> Tuple<'static> {
        Tuple { columns: 4, bytes: &TUPLE[2..] }
    }

    /// One frame of each message and form, and what it says.
    fn messages() -> Vec<(Vec<u8>, Event<'static>)> {
        let change = |change| Event::Change { relation: 0x4001, change };
        let column = |name: &str, type_oid, type_modifier, identity| Column {
            name: name.to_owned(),
            type_oid,
            type_modifier,
            identity,
        };
        let orders = Relation {
            oid: 0x4001,
            schema: "shop".to_owned(),
            name: "bücher".to_owned(),
            identity: ReplicaIdentity::Default,
            columns: vec![column("id", 23, -1, true), column("title", 1043, 24, false)],
        };
        let catalog =
            Relation { schema: "pg_catalog".to_owned(), name: "t".to_owned(), columns: vec![], ..orders.clone() };
        vec![
            (
                frame(&[b"B", &[0, 0, 0, 1, 0, 0, 0, 0x20], &[0, 0, 0, 0, 0, 0, 0, 9], &[0, 0, 2, 0xE4]]),
                Event::Begin { commit_lsn: Lsn(0x1_0000_0020), commit_time: Timestamp(9), xid: Xid(740) },
            ),
            (
                frame(&[b"C\0", &[0, 0, 0, 0, 0, 0, 0, 1], &[0, 0, 0, 0, 0, 0, 0, 2], &[0xFF; 8]]),
                Event::Commit { commit_lsn: Lsn(1), end_lsn: Lsn(2) },
            ),
            (
                frame(&[
                    b"R\0\0\x40\x01shop\0b\xC3\xBCcher\0d\0\x02",
                    b"\x01id\0\0\0\0\x17\xFF\xFF\xFF\xFF",
                    b"\0title\0\0\0\x04\x13\0\0\0\x18",
                ]),
                Event::Relation(orders),
            ),
            (b"R\0\0\x40\x01\0t\0d\0\0".to_vec(), Event::Relation(catalog)),
            (frame(&[b"I\0\0\x40\x01N", TUPLE]), change(Change::Insert { new: tuple() })),
            (frame(&[b"U\0\0\x40\x01N", TUPLE]), change(Change::Update { old: None, new: tuple() })),
            (
                frame(&[b"U\0\0\x40\x01K", TUPLE, b"N", TUPLE]),
                change(Change::Update { old: Some(OldTuple::Key(tuple())), new: tuple() }),
            ),
            (
                frame(&[b"U\0\0\x40\x01O", TUPLE, b"N", TUPLE]),
                change(Change::Update { old: Some(OldTuple::Full(tuple())), new: tuple() }),
            ),
            (frame(&[b"D\0\0\x40\x01K", TUPLE]), change(Change::Delete { old: OldTuple::Key(tuple()) })),
            (frame(&[b"D\0\0\x40\x01O", TUPLE]), change(Change::Delete { old: OldTuple::Full(tuple()) })),
            (b"T\0\0\0\x02\x03\0\0\0\x07\0\0\0\x08".to_vec(), Event::Truncate { relations: vec![7, 8] }),
            (
                b"M\x01\0\0\0\0\0\0\0\x05keepstep\0\0\0\0\x02hi".to_vec(),
                Event::Message { transactional: true, lsn: Lsn(5), prefix: b"keepstep", content: b"hi" },
            ),
            (
                b"M\0\0\0\0\0\0\0\0\x05\0\0\0\0\0".to_vec(),
                Event::Message { transactional: false, lsn: Lsn(5), prefix: b"", content: b"" },
            ),
            (b"O\0\0\0\0\0\0\0\x01node\0".to_vec(), Event::Other),
            (b"Y\0\0\x40\x02shop\0mood\0".to_vec(), Event::Other),
        ]
    }

    #[test]
    fn reads_every_message() {
        for (frame, event) in messages() {
            assert_eq!(parse(&frame), Ok(event));
        }
    }

    #[test]
    fn walks_over_a_tuple() {
        assert_eq!(tuple().datums().len(), 4);
        let mut datums = vec![Datum::Null; 9];
        tuple().read_into(&mut datums);
        assert_eq!(datums, TUPLE_DATUMS);
    }

    #[test]
    fn refuses_every_shorter_and_longer_frame() {
        for (frame, _) in messages() {
            for length in 0..frame.len() {
                assert!(parse(&frame[..length]).is_err(), "the first {length} bytes of {frame:?}");
            }
            let longer = [&frame[..], b"\0"].concat();
            assert!(parse(&longer).is_err(), "{longer:?}");
        }
    }

    #[test]
    fn says_what_is_wrong_and_where() {
        let cases: &[(&[u8], &str)] = &[
            (b"", "empty pgoutput message"),
            (b"Z", "pgoutput message of unknown type 0x5a"),
            (b"S\0\0\0\x01\x01", "pgoutput message of unknown type 0x53"),
            (b"I\0\0", "pgoutput Insert message, byte 1: it ends too early"),
            (b"I\0\0\0\x01O\0\0", "pgoutput Insert message, byte 6: unknown tuple kind 0x4f"),
            (b"I\0\0\0\x01N\xFF\xFF", "pgoutput Insert message, byte 8: the column count is negative"),
            (
                b"I\0\0\0\x01N\0\x01t\xFF\xFF\xFF\xFF",
                "pgoutput Insert message, byte 13: the length of a column is negative",
            ),
            (b"I\0\0\0\x01N\0\x01t\0\0\0\x02x", "pgoutput Insert message, byte 13: it ends too early"),
            (
                b"I\0\0\0\x01N\0\x01b\0\0\0\x01x",
                "pgoutput Insert message, byte 9: a column is in binary form, which was not requested",
            ),
            (b"I\0\0\0\x01N\0\x01x", "pgoutput Insert message, byte 9: unknown column kind 0x78"),
            (b"I\0\0\0\x01N\0\x00xyz", "pgoutput Insert message, byte 8: 3 bytes are left over"),
            (b"U\0\0\0\x01K\0\0O\0\0", "pgoutput Update message, byte 9: unknown tuple kind 0x4f"),
            (b"D\0\0\0\x01N\0\0", "pgoutput Delete message, byte 6: unknown tuple kind 0x4e"),
            (b"R\0\0\0\x01a\0b\0x\0\0", "pgoutput Relation message, byte 10: unknown replica identity 0x78"),
            (b"R\0\0\0\x01\xFF\0b\0d\0\0", "pgoutput Relation message, byte 7: a name is not UTF-8"),
            (b"T\xFF\xFF\xFF\xFF\0", "pgoutput Truncate message, byte 5: the relation count is negative"),
            (b"T\x7F\xFF\xFF\xFF\0", "pgoutput Truncate message, byte 6: it ends too early"),
            (b"M\x02", "pgoutput Message message, byte 2: unknown flags 0x02"),
            (
                b"M\0\0\0\0\0\0\0\0\0\0\xFF\xFF\xFF\xFF",
                "pgoutput Message message, byte 15: the content length is negative",
            ),
        ];
        for (frame, message) in cases {
            assert_eq!(&parse(frame).unwrap_err().to_string(), message);
        }
    }
}
