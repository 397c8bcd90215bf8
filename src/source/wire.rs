//! The bytes of a replication connection: messages out of one growing buffer, without a copy.
//!
//! The published `tokio-postgres` has no CopyBoth, so this stands on `postgres-protocol` for what is sent and reads
//! what is received by itself (the manual's "Message Formats"). Reading is split in two, because whoever drives it
//! selects over many things: [`Wire::fill`] waits for bytes and may be dropped at any time, [`Wire::next_copy_data`]
//! never waits and lends a slice of the buffer. What was consumed is only moved away when room is needed.
//!
//! Sending never waits either once streaming has begun: [`Wire::send_if_room`] keeps what the socket does not take in a
//! small buffer and drops what does not fit. Two peers that both wait until the other one reads would wait for ever.

use std::future::{Future, poll_fn};
use std::io;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::connect::Stream;
use super::server_error::ServerError;
use crate::error::{Error, ErrorKind, Result};

/// What the buffer starts with, and shrinks to after a huge message.
const BUFFER_BYTES: usize = 256 * 1024;
/// A read is only worth its system call with this much room.
const READ_BYTES_MIN: usize = 64 * 1024;
/// The largest message: Postgres builds each in a StringInfo, which ends at 1 GiB (`MaxAllocSize`).
const MESSAGE_BYTES_MAX: usize = 1 << 30;
/// Until the server has proved to be Postgres its messages are small; something else's bytes read as a huge length.
const STARTUP_MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// Unsent bytes beyond which another message is dropped.
const UNSENT_BYTES_MAX: usize = 4 * 1024;
/// A tag and a length that counts itself.
const HEADER_BYTES: usize = 5;

/// A row of a simple query: its columns as text.
pub(super) type Row = Vec<Option<String>>;

/// One message in the buffer.
#[derive(Clone, Debug)]
pub(super) struct Message {
    /// Its type.
    pub(super) tag: u8,
    body: Range<usize>,
}

/// A connection that speaks the protocol.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Stream,
    received: Vec<u8>,
    /// Where the next message begins in `received`.
    position: usize,
    message_bytes_max: usize,
    unsent: Vec<u8>,
    /// Whether the stream may hold bytes itself that it took from `unsent` (TLS does).
    unflushed: bool,
}

impl Wire {
    /// Over a fresh connection, before start-up.
    pub(super) fn new(stream: Stream) -> Self {
        Wire {
            stream,
            received: Vec::with_capacity(BUFFER_BYTES),
            position: 0,
            message_bytes_max: STARTUP_MESSAGE_BYTES_MAX,
            unsent: Vec::new(),
            unflushed: false,
        }
    }

    /// What SCRAM can be bound to.
    pub(super) fn binding(&self) -> Option<Vec<u8>> {
        self.stream.binding()
    }

    /// Start-up is over: messages may be as large as rows.
    pub(super) fn established(&mut self) {
        self.message_bytes_max = MESSAGE_BYTES_MAX;
    }

    /// Waits for more bytes. Cancel-safe. What [`Wire::send_if_room`] left behind goes out meanwhile.
    ///
    /// # Errors
    /// [`ErrorKind::PostgresAway`] when the connection ends or breaks.
    pub(super) async fn fill(&mut self) -> Result<()> {
        self.fill_io().await.map_err(cut)
    }

    /// The same, with the error as it comes.
    pub(super) async fn fill_io(&mut self) -> io::Result<()> {
        self.make_room();
        let read = poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = self.poll_unsent(cx) {
                return Poll::Ready(Err(error));
            }
            pin!(self.stream.read_buf(&mut self.received)).poll(cx)
        });
        match read.await? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
            _ => Ok(()),
        }
    }

    /// Moves what is left of a message to the front once the room behind it gets short, and gives back what a huge
    /// message took. Grows only as bytes arrive, never by what a header claims.
    fn make_room(&mut self) {
        let left = self.received.len() - self.position;
        if left > 0 && self.received.capacity() - self.received.len() >= READ_BYTES_MIN {
            return;
        }
        self.received.drain(..self.position);
        self.position = 0;
        if self.received.capacity() > BUFFER_BYTES && left < BUFFER_BYTES - READ_BYTES_MIN {
            self.received.shrink_to(BUFFER_BYTES);
        }
        if self.received.capacity() - left < READ_BYTES_MIN {
            self.received.reserve(BUFFER_BYTES);
        }
    }

    /// The next whole message in the buffer, which is passed over.
    fn next_message(&mut self) -> Result<Option<Message>> {
        let Some(&[tag, a, b, c, d]) = self.received[self.position..].first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if !(HEADER_BYTES - 1..=self.message_bytes_max).contains(&length) {
            return Err(protocol(format!("a message of type {tag:#04x} claims a length of {length} bytes")));
        }
        let end = self.position + 1 + length;
        if self.received.len() < end {
            return Ok(None);
        }
        let body = self.position + HEADER_BYTES..end;
        self.position = end;
        Ok(Some(Message { tag, body }))
    }

    /// The bytes of a message, valid until the next [`Wire::fill`].
    pub(super) fn body(&self, message: &Message) -> &[u8] {
        &self.received[message.body.clone()]
    }

    /// The payload of the next CopyData message in the buffer; `None` if it has not arrived yet. Does no I/O.
    ///
    /// # Errors
    /// What the server says instead, by its kind; [`ErrorKind::PostgresAway`] when it ends the stream;
    /// [`ErrorKind::Protocol`] for anything else.
    pub(super) fn next_copy_data(&mut self) -> Result<Option<&[u8]>> {
        loop {
            let Some(message) = self.next_message()? else { return Ok(None) };
            match message.tag {
                b'd' => return Ok(Some(&self.received[message.body])),
                b'N' | b'S' | b'A' => {}
                b'E' => return Err(ServerError::parse(self.body(&message)).into_error("Postgres ends the stream")),
                // CopyDone, or CommandComplete from a walsender of a server that shuts down.
                b'c' | b'C' => return Err(Error::new(ErrorKind::PostgresAway, "Postgres ended the stream")),
                tag => return Err(unexpected(tag, "while streaming")),
            }
        }
    }

    /// The next message that is no notice and no changed parameter. For everything but streaming.
    pub(super) async fn message(&mut self) -> Result<Message> {
        loop {
            match self.next_message()? {
                Some(message) if matches!(message.tag, b'N' | b'S' | b'A') => {}
                Some(message) => return Ok(message),
                None => self.fill().await?,
            }
        }
    }

    /// The next message of start-up, whichever it is.
    pub(super) async fn startup_message(&mut self) -> io::Result<Result<Message>> {
        loop {
            match self.next_message() {
                Ok(Some(message)) => return Ok(Ok(message)),
                Ok(None) => self.fill_io().await?,
                Err(error) => return Ok(Err(error)),
            }
        }
    }

    /// Sends, waiting until the socket has taken it. Not while streaming.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// A simple query, or a command of the replication protocol; its rows.
    ///
    /// # Errors
    /// What the server says, by its kind.
    pub(super) async fn query(&mut self, doing: &str, sql: &str) -> Result<Vec<Row>> {
        self.send_query(sql).await?;
        let mut rows = Vec::new();
        let mut refused = None;
        loop {
            let message = self.message().await?;
            let body = self.body(&message);
            match message.tag {
                b'D' => rows.push(row(body).ok_or_else(|| protocol("a row is cut short"))?),
                b'E' => refused = Some(ServerError::parse(body)),
                b'T' | b'C' | b'I' => {}
                b'Z' => return refused.map_or(Ok(rows), |error| Err(error.into_error(doing))),
                tag => return Err(unexpected(tag, "in answer to a query")),
            }
        }
    }

    /// A command that begins CopyBoth. After a refusal the connection takes queries again.
    pub(super) async fn copy_both(&mut self, command: &str) -> Result<Result<(), ServerError>> {
        self.send_query(command).await?;
        let mut refused = None;
        loop {
            let message = self.message().await?;
            match (message.tag, &refused) {
                (b'W', None) => return Ok(Ok(())),
                (b'E', None) => refused = Some(ServerError::parse(self.body(&message))),
                (b'Z', Some(error)) => return Ok(Err(ServerError::clone(error))),
                (tag, _) => return Err(unexpected(tag, "in answer to START_REPLICATION")),
            }
        }
    }

    async fn send_query(&mut self, sql: &str) -> Result<()> {
        let mut message = BytesMut::new();
        frontend::query(sql, &mut message).map_err(|error| protocol("a query cannot be sent").because(error))?;
        self.send(&message).await.map_err(cut)
    }

    /// Sends CopyData while streaming; `false` if too much is unsent already, and the message was dropped. Never waits.
    pub(super) async fn send_if_room(&mut self, payload: &[u8]) -> Result<bool> {
        if self.unsent.len() + payload.len() > UNSENT_BYTES_MAX {
            return Ok(false);
        }
        let length = u32::try_from(payload.len() + HEADER_BYTES - 1).map_err(|_| protocol("a message is too long"))?;
        self.unsent.push(b'd');
        self.unsent.extend_from_slice(&length.to_be_bytes());
        self.unsent.extend_from_slice(payload);
        let sent = poll_fn(|cx| match self.poll_unsent(cx) {
            Poll::Ready(outcome) => Poll::Ready(outcome),
            Poll::Pending => Poll::Ready(Ok(())),
        });
        sent.await.map_err(cut)?;
        Ok(true)
    }

    /// Sends what is unsent, as far as the socket takes it.
    fn poll_unsent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unsent.is_empty() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.unsent))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => drop(self.unsent.drain(..sent)),
            }
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Sends what is unsent, says good-bye, and waits until the server has closed the connection too: then nothing of
    /// this session is held there any more.
    pub(super) async fn close(&mut self) -> io::Result<()> {
        let mut last = std::mem::take(&mut self.unsent);
        let mut terminate = BytesMut::new();
        frontend::terminate(&mut terminate);
        last.extend_from_slice(&terminate);
        let (mut reader, mut writer) = tokio::io::split(&mut self.stream);
        // Both at once: the server may have to get rid of what it was sending before it reads this.
        let say = async {
            writer.write_all(&last).await?;
            writer.flush().await
        };
        let listen = async { tokio::io::copy(&mut reader, &mut tokio::io::sink()).await };
        // How the server ends does not matter, only that it does: a reset is as good as a close.
        let (said, _) = tokio::join!(say, listen);
        said
    }
}

/// A DataRow's columns.
fn row(body: &[u8]) -> Option<Row> {
    let (count, mut rest) = body.split_first_chunk::<2>()?;
    let mut columns = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        rest = tail;
        columns.push(match usize::try_from(i32::from_be_bytes(*length)) {
            Ok(length) => {
                let (text, tail) = rest.split_at_checked(length)?;
                rest = tail;
                Some(String::from_utf8_lossy(text).into_owned())
            }
            Err(_) => None,
        });
    }
    rest.is_empty().then_some(columns)
}

/// The connection broke.
pub(super) fn cut(error: io::Error) -> Error {
    Error::new(ErrorKind::PostgresAway, "the connection to Postgres broke").because(error)
}

/// The server sent what the protocol does not allow.
pub(super) fn protocol(what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Protocol, format!("Postgres sent what its protocol does not allow: {what}"))
}

/// A message where it does not belong.
pub(super) fn unexpected(tag: u8, place: &str) -> Error {
    protocol(format!("a message of type {tag:#04x} {place}"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;
    use tokio::net::UnixStream;

    use super::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), body].concat()
    }

    fn pair() -> (Wire, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut wire = Wire::new(Stream::Unix(ours));
        wire.established();
        (wire, theirs)
    }

    async fn next(wire: &mut Wire) -> Vec<u8> {
        loop {
            if let Some(payload) = wire.next_copy_data().unwrap() {
                return payload.to_vec();
            }
            wire.fill().await.unwrap();
        }
    }

    /// The error of a connection on which these bytes arrive.
    async fn error_of(bytes: &[u8]) -> Error {
        let (mut wire, mut server) = pair();
        server.write_all(bytes).await.unwrap();
        wire.fill().await.unwrap();
        wire.next_copy_data().unwrap_err()
    }

    #[tokio::test]
    async fn messages_arrive_whole_however_they_are_cut() {
        let bytes = [message(b'd', b"one"), message(b'N', b"a notice"), message(b'd', b""), message(b'd', b"three")];
        let bytes = bytes.concat();
        for cut in 0..bytes.len() {
            let (mut wire, mut server) = pair();
            for part in [&bytes[..cut], &bytes[cut..]] {
                server.write_all(part).await.unwrap();
                if !part.is_empty() {
                    wire.fill().await.unwrap();
                }
            }
            for expected in ["one", "", "three"] {
                assert_eq!(next(&mut wire).await, expected.as_bytes(), "cut at {cut}");
            }
            assert!(wire.next_copy_data().unwrap().is_none());
        }
    }

    #[tokio::test]
    async fn a_huge_message_passes_and_its_memory_is_given_back() {
        let (mut wire, mut server) = pair();
        let sizes = [100, 5 << 20, 100, 300 << 10, 70 << 10, 0];
        let sent = tokio::spawn(async move {
            for size in sizes {
                server.write_all(&message(b'd', &vec![b'x'; size])).await.unwrap();
            }
            server
        });
        for size in sizes {
            assert_eq!(next(&mut wire).await.len(), size);
        }
        let mut server = sent.await.unwrap();
        server.write_all(&message(b'd', b"last")).await.unwrap();
        assert_eq!(next(&mut wire).await, b"last");
        assert!(wire.received.capacity() <= 2 * BUFFER_BYTES, "{}", wire.received.capacity());
    }

    #[tokio::test]
    async fn lengths_are_not_believed() {
        for length in [0_u32, 3, (1 << 30) + 1, u32::MAX] {
            let bytes = [&b"d"[..], &length.to_be_bytes()].concat();
            assert_eq!(error_of(&bytes).await.kind(), ErrorKind::Protocol, "{length}");
        }
        let (mut wire, mut server) = pair();
        wire.message_bytes_max = STARTUP_MESSAGE_BYTES_MAX;
        server.write_all(b"HTTP/1.1 400 Bad Request\r\n").await.unwrap();
        wire.fill().await.unwrap();
        assert_eq!(wire.next_message().unwrap_err().kind(), ErrorKind::Protocol);
        // A believable claim takes no memory before its bytes are there.
        let (mut wire, mut server) = pair();
        server.write_all(&[&b"d"[..], &(1_u32 << 30).to_be_bytes()].concat()).await.unwrap();
        wire.fill().await.unwrap();
        assert!(wire.next_copy_data().unwrap().is_none());
        assert!(wire.received.capacity() <= BUFFER_BYTES);
    }

    #[tokio::test]
    async fn the_end_of_a_stream_is_an_error_of_its_kind() {
        let away = error_of(&message(b'E', b"C57P01\0Mshutting down\0\0")).await;
        assert_eq!(away.kind(), ErrorKind::PostgresAway);
        for end in [message(b'c', b""), message(b'C', b"COPY 0\0")] {
            assert_eq!(error_of(&end).await.kind(), ErrorKind::PostgresAway);
        }
        assert_eq!(error_of(&message(b'E', b"C42501\0Mno\0\0")).await.kind(), ErrorKind::PostgresDenied);
        assert_eq!(error_of(&message(b'D', b"")).await.kind(), ErrorKind::Protocol);
        let (mut wire, server) = pair();
        drop(server);
        assert_eq!(wire.fill().await.unwrap_err().kind(), ErrorKind::PostgresAway);
    }

    #[tokio::test]
    async fn sending_never_waits_and_what_was_taken_arrives_whole() {
        let (mut wire, mut server) = pair();
        let payload = vec![b'p'; 1000];
        let mut taken = 0;
        while wire.send_if_room(&payload).await.unwrap() {
            taken += 1;
        }
        assert!(taken > 0 && wire.unsent.len() <= UNSENT_BYTES_MAX);
        // The server reads again while we wait for it, and answers when it has everything.
        let expected = message(b'd', &payload).repeat(taken);
        let reading = tokio::spawn(async move {
            let mut read = vec![0; expected.len()];
            server.read_exact(&mut read).await.unwrap();
            assert!(read == expected);
            server.write_all(&message(b'd', b"got it")).await.unwrap();
            server
        });
        assert_eq!(next(&mut wire).await, b"got it");
        drop(reading.await.unwrap());
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = row(&bytes);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let (mut wire, _server) = pair();
                wire.received.extend_from_slice(&bytes);
                while let Ok(Some(_)) = wire.next_copy_data() {}
            });
        }
    }
}
