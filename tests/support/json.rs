//! A Redis with the JSON type, as far as keepstep needs it, in front of one that has not: commands on the way are translated.
//!
//! A document is kept as a string with a mark before it, so that whatever else there is (MULTI, UNLINK, TTLs, SCAN) is Redis's
//! own. JSON.SET, JSON.GET and TYPE become scripts that know the mark. What they answer is what RedisJSON 2 answers, its
//! error without a code too; documents come back with other spaces than they were written with.

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What `held` is: `none`, `json`, or `other`.
const HELD: &str = "\
local mark = '\\0json\\0'
local kind, held = redis.call('TYPE', KEYS[1]).ok, 'other'
if kind == 'none' then held = 'none' end
if kind == 'string' and redis.call('GETRANGE', KEYS[1], 0, 5) == mark then held = 'json' end
local wrong = {err = 'Existing key has wrong Redis type'}
";
const SET: &str = "\
if held == 'other' then return wrong end
if ARGV[2] == 'XX' and held == 'none' then return false end
if not pcall(cjson.decode, ARGV[1]) then return {err = 'expected value at line 1 column 1'} end
redis.call('SET', KEYS[1], mark .. ARGV[1], 'KEEPTTL')
return {ok = 'OK'}";
const GET: &str = "\
if held == 'none' then return false end
if held == 'other' then return wrong end
return '{  ' .. string.sub(redis.call('GET', KEYS[1]), 8)";
const TYPE: &str = "return {ok = held == 'json' and 'ReJSON-RL' or kind}";

/// See the module.
pub(crate) struct JsonRedis {
    /// Where to connect instead.
    pub(crate) port: u16,
    listener: JoinHandle<()>,
}

impl JsonRedis {
    /// Listens on a free port, in front of the server on the port `target`.
    pub(crate) async fn before(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let listener = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(connect(client, target));
            }
        });
        JsonRedis { port, listener }
    }

    /// The URL for `[redis]`.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}/", self.port)
    }
}

impl Drop for JsonRedis {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// Carries one connection until an end closes it.
async fn connect(client: TcpStream, target: u16) {
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, mut to_client) = client.into_split();
    let (mut from_server, to_server) = server.into_split();
    tokio::select! {
        _ = translate(BufReader::new(from_client), BufWriter::new(to_server)) => {}
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
    }
}

/// Passes commands on, as what the server knows.
async fn translate(mut from: BufReader<OwnedReadHalf>, mut to: BufWriter<OwnedWriteHalf>) -> Option<()> {
    loop {
        let count = number(&mut from, b'*').await?;
        let mut words = Vec::with_capacity(count);
        for _ in 0..count {
            let mut word = vec![0; number(&mut from, b'$').await? + 2];
            from.read_exact(&mut word).await.ok()?;
            word.truncate(word.len() - 2);
            words.push(word);
        }
        let words = translated(words);
        to.write_all(format!("*{}\r\n", words.len()).as_bytes()).await.ok()?;
        for word in words {
            to.write_all(format!("${}\r\n", word.len()).as_bytes()).await.ok()?;
            to.write_all(&word).await.ok()?;
            to.write_all(b"\r\n").await.ok()?;
        }
        if from.buffer().is_empty() {
            to.flush().await.ok()?;
        }
    }
}

/// A line of RESP: its first byte, and a number.
async fn number(from: &mut BufReader<OwnedReadHalf>, first: u8) -> Option<usize> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line).await.ok()?;
    let digits = line.strip_prefix(&[first])?.strip_suffix(b"\r\n")?;
    str::from_utf8(digits).ok()?.parse().ok()
}

fn translated(words: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    let script = |body: &str, key: &[u8], more: &[Vec<u8>]| {
        let script = [HELD, body].concat().into_bytes();
        let mut words = vec![b"EVAL".to_vec(), script, b"1".to_vec(), key.to_vec()];
        words.extend_from_slice(more);
        words
    };
    let command = words[0].to_ascii_uppercase();
    match (&*command, &words[1..]) {
        (b"JSON.SET", [key, path, more @ ..]) if path == b"$" => script(SET, key, more),
        (b"JSON.GET", [key]) => script(GET, key, &[]),
        (b"TYPE", [key]) => script(TYPE, key, &[]),
        _ => words,
    }
}
