//! From sending COMMIT until the change can be seen: in Redis, or in what `pg_recvlogical` prints.
//!
//! Each transaction inserts one row, at a given rate; eight connections take turns, so that a slow one does not hold
//! back the next seven, and a round that did not reach its rate fails. Redis tells of the key itself (keyspace notifications), so nobody polls and takes time from
//! what is measured; `pg_recvlogical` writes into a pipe. Both are read by a thread that sleeps until something comes.

use std::collections::HashMap;
use std::io::Read;
use std::process::Stdio;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use tokio_postgres::NoTls;

use crate::stand::{Program, Stand, json_rules, runtime};
use crate::{Figure, ROUNDS};

/// Changes that come first and do not count, and the time between them.
const WARM_UP: u32 = 50;
const WARM_UP_PAUSE: Duration = Duration::from_millis(5);
/// Transactions take turns on so many connections.
const CONNECTIONS: u32 = 8;
/// A change that is not seen by then is lost.
const LIMIT: Duration = Duration::from_secs(10);
/// An id is this letter and nine digits, so that it can be found in pgoutput's bytes.
const ID: &[u8] = b"\x00\x00\x00\x0ak";
const ID_DIGITS: usize = 9;

/// Transactions a second, and how long a round of it takes.
struct Load {
    per_s: u32,
    full_s: u32,
    quick_s: u32,
    /// Whether servers and daemon are idle in between: what the targets are about.
    light: bool,
}

const LOADS: [Load; 3] = [
    Load { per_s: 1, full_s: 35, quick_s: 2, light: true },
    Load { per_s: 100, full_s: 10, quick_s: 1, light: true },
    Load { per_s: 5000, full_s: 5, quick_s: 1, light: false },
];

/// A percentile says something only if so many delays lie beyond it.
const BEYOND_MIN: f64 = 1.0;

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&["--notify-keyspace-events", "E$"]);
    stand.sql("create table event (id text primary key, filler text)");
    stand.publish("event", "event");
    stand.copy_slot("event", "event_print");
    let mut next_id = 0;
    let (mut figures, mut light_ms) = (Vec::new(), 0.0);
    for load in &LOADS {
        let changes = load.per_s * if quick { load.quick_s } else { load.full_s };
        let (mut ours_ms, mut theirs_ms) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let daemon = stand.keepstep("event", &json_rules("event", "id", 1));
            ours_ms.extend(round(&stand, load, changes, &mut next_id, &in_redis(&stand)));
            daemon.end();
            let (printer, printed) = printed(&stand);
            theirs_ms.extend(round(&stand, load, changes, &mut next_id, &printed));
            printer.end();
        }
        ours_ms.sort_by(f64::total_cmp);
        theirs_ms.sort_by(f64::total_cmp);
        figures.extend(self::figures(load, &ours_ms, &theirs_ms));
        if load.light {
            light_ms = percentile(&theirs_ms, 0.5);
        }
    }
    figures.push(limit(&stand, light_ms));
    figures
}

/// When each id was seen.
type Seen = Receiver<(u32, Instant)>;

/// Subscribes to every key that is set.
fn in_redis(stand: &Stand) -> Seen {
    let mut listener = stand.redis();
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        let mut subscribed = listener.as_pubsub();
        subscribed.subscribe("__keyevent@0__:set").expect("a subscription");
        while let Ok(message) = subscribed.get_message() {
            let (at, key) = (Instant::now(), message.get_payload_bytes());
            let id = key.strip_prefix(b"bench:event:k").map(number);
            if id.is_some_and(|id| sender.send((id, at)).is_err()) {
                return;
            }
        }
    });
    seen
}

/// `pg_recvlogical` with the same plugin, into a pipe.
fn printed(stand: &Stand) -> (Program, Seen) {
    let mut program = Program::start(stand.recvlogical("event_print", "-").stdout(Stdio::piped()));
    let mut out = program.child.stdout.take().expect("a pipe");
    let (sender, seen) = channel();
    std::thread::spawn(move || {
        let (mut buffer, mut kept) = (vec![0; 64 << 10], 0);
        while let Ok(length @ 1..) = out.read(&mut buffer[kept..]) {
            let (at, end) = (Instant::now(), kept + length);
            let mut rest = &buffer[..end];
            while let Some(start) = rest.windows(ID.len()).position(|window| window == ID) {
                let Some(digits) = rest[start + ID.len()..].get(..ID_DIGITS) else { break };
                if sender.send((number(digits), at)).is_err() {
                    return;
                }
                rest = &rest[start + ID.len() + ID_DIGITS..];
            }
            // An id may be cut in two.
            kept = rest.len().min(ID.len() + ID_DIGITS);
            buffer.copy_within(end - kept..end, 0);
        }
    });
    (program, seen)
}

fn number(digits: &[u8]) -> u32 {
    digits.iter().fold(0, |number, digit| number * 10 + u32::from(digit - b'0'))
}

/// Some changes that do not count, then those of the load; each must be seen. Gives the delays in milliseconds.
fn round(stand: &Stand, load: &Load, changes: u32, next_id: &mut u32, seen: &Seen) -> Vec<f64> {
    let (url, runtime) = (stand.postgres.url("postgres"), runtime());
    let first = *next_id + WARM_UP;
    runtime.block_on(insert(&url, *next_id..first, WARM_UP_PAUSE, 1));
    // Then what the other side's round has left in the slot is behind us too.
    while seen.recv_timeout(LIMIT).expect("the warm-up was not seen").0 + 1 != first {}
    let pause = Duration::from_secs(1) / load.per_s;
    let connections = CONNECTIONS.min(changes);
    *next_id = first + changes;
    let committed = runtime.block_on(insert(&url, first..first + changes, pause, connections));
    let took = committed.values().max().zip(committed.values().min()).map(|(last, first)| *last - *first);
    assert!(took.is_some_and(|took| took < pause * (changes + changes / 10 + 1)), "the load was not reached: {took:?}");
    let mut delays_ms = Vec::with_capacity(committed.len());
    while delays_ms.len() < committed.len() {
        let (id, at) = seen.recv_timeout(LIMIT).expect("a change was not seen");
        let since = committed.get(&id).map(|began| at.saturating_duration_since(*began));
        delays_ms.extend(since.map(|delay| delay.as_secs_f64() * 1e3));
    }
    delays_ms
}

/// Of sorted delays, the one that this share of them does not exceed.
fn percentile(sorted_ms: &[f64], share: f64) -> f64 {
    sorted_ms[((sorted_ms.len() as f64 * share).ceil() as usize).clamp(1, sorted_ms.len()) - 1]
}

/// Inserts rows one `pause` after the other; gives when each COMMIT was sent.
async fn insert(url: &str, ids: std::ops::Range<u32>, pause: Duration, connections: u32) -> HashMap<u32, Instant> {
    let connect = async |_| {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.expect("a connection");
        tokio::spawn(connection);
        client
    };
    let clients = futures_util::future::join_all((0..connections).map(connect)).await;
    // The clock starts once all are connected, or a late one would begin with everything that it has missed.
    let began = Instant::now();
    let writers = clients.into_iter().enumerate().map(|(number, client)| {
        let ids = ids.clone();
        async move {
            let mut committed = Vec::new();
            for id in ids.clone().skip(number).step_by(connections as usize) {
                tokio::time::sleep_until((began + pause * (id - ids.start)).into()).await;
                let row = format!("begin; insert into event values ('k{id:09}', repeat('x', 100))");
                client.batch_execute(&row).await.expect("an insert");
                committed.push((id, Instant::now()));
                client.batch_execute("commit").await.expect("a commit");
            }
            committed
        }
    });
    futures_util::future::join_all(writers).await.into_iter().flatten().collect()
}

/// What `pg_recvlogical` would take if it did one SET behind each line: its own median at the busier light load, and
/// that of a SET, from sending it until its notification is read.
fn limit(stand: &Stand, printed_ms: f64) -> Figure {
    let (seen, mut client) = (in_redis(stand), stand.redis());
    std::thread::sleep(WARM_UP_PAUSE * WARM_UP);
    let mut delays_ms: Vec<f64> = (0..6 * WARM_UP)
        .map(|id| {
            std::thread::sleep(WARM_UP_PAUSE);
            let began = Instant::now();
            redis::cmd("SET").arg(format!("bench:event:k{id:09}")).arg("x").exec(&mut client).expect("a SET");
            let (_, at) = seen.recv_timeout(LIMIT).expect("a notification");
            at.saturating_duration_since(began).as_secs_f64() * 1e3
        })
        .collect();
    delays_ms.sort_by(f64::total_cmp);
    let p50 = delays_ms[delays_ms.len() / 2];
    Figure::shown("  limit: pg_recvlogical at 100/s, then one SET (ms)", printed_ms + p50, printed_ms)
}

fn figures(load: &Load, ours_ms: &[f64], theirs_ms: &[f64]) -> Vec<Figure> {
    let name = |name: &str| format!("commit to visible, {}/s, {name} (ms)", load.per_s);
    let at = |share| (percentile(ours_ms, share), percentile(theirs_ms, share));
    let says_something = |share: f64| ours_ms.len() as f64 * (1.0 - share) >= BEYOND_MIN;
    let ((p50, p50_theirs), (p99, p99_theirs)) = (at(0.5), at(0.99));
    let mut figures = match load.light {
        true => vec![
            Figure::ratio_at_most(name("p50"), p50, p50_theirs, 1.5),
            Figure::value(name("p99"), p99, p99_theirs, "<= 5 ms", |ms| ms <= 5.0),
        ],
        false => vec![Figure::shown(name("p50"), p50, p50_theirs), Figure::shown(name("p99"), p99, p99_theirs)],
    };
    figures.truncate(if says_something(0.99) { 2 } else { 1 });
    for (title, share) in [("p99.9", 0.999), ("max", 1.0)] {
        if share == 1.0 || says_something(share) {
            let (ours, theirs) = at(share);
            figures.push(Figure::shown(name(title), ours, theirs));
        }
    }
    figures
}
