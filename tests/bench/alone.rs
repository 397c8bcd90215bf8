//! The two halves by themselves: a captured stream through everything but the sockets, and batches into Redis.

use std::sync::Arc;
use std::time::Instant;

use keepstep::batch::{Batch, Form, Life, Limits};
use keepstep::cache::Cache;
use keepstep::cache::checkpoint::{Checkpoint, RuleSet};
use keepstep::cache::writer::Writer;
use keepstep::metrics::Metrics;

use crate::stand::{Stand, json_rules, runtime};
use crate::stream::{Replay, Stream, checkpoint};
use crate::{Figure, ROUNDS, median};

/// Of the values that Redis gets, from keepstep and from `redis-benchmark`.
const VALUE_BYTES: usize = 60;

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let stand = Stand::start(&[]);
    vec![
        daemon(&stand, if quick { 100_000 } else { 1_000_000 }),
        cache(&stand, if quick { 200_000 } else { 1_000_000 }),
    ]
}

/// What Postgres sent for a table of narrow rows, taken again and again on one core; decoding alone is the baseline.
fn daemon(stand: &Stand, rows: usize) -> Figure {
    stand.sql("create table narrow (id bigint primary key, n int, name text)");
    stand.publish("narrow", "narrow");
    stand.sql(&format!("insert into narrow select g, g, 'name ' || g from generate_series(1, {rows}) g"));
    let mut frames = Vec::new();
    let rules = json_rules("narrow", "id", 1);
    stand.receive("narrow", &rules, rows, |frame| frames.push(frame.to_vec()));
    let stream = Stream::captured(rules, frames);
    let mut replay = Replay::new(&stream);
    replay.run(&stream);
    let rounds: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            std::hint::black_box(replay.run(&stream));
            let whole_s = began.elapsed().as_secs_f64();
            stream.decode();
            (rows as f64 / whole_s, rows as f64 / (began.elapsed().as_secs_f64() - whole_s))
        })
        .collect();
    let (value, baseline) = (median(&rounds, |round| round.0), median(&rounds, |round| round.1));
    let measure = "the daemon alone; baseline: decoding (rows/s)";
    Figure::value(measure, value, baseline, ">= 1M", |rows_per_s| rows_per_s >= 1e6)
}

/// Full batches of new keys through the writer, next to `redis-benchmark`.
fn cache(stand: &Stand, keys: usize) -> Figure {
    let config = stand.config("cache", "");
    let limits = Limits { ops: config.redis.batch_ops, bytes: config.redis.batch_bytes };
    let batches: Vec<Batch> =
        (0..keys).step_by(limits.ops).map(|first| batch(first..keys.min(first + limits.ops), limits)).collect();
    let rules = Arc::new(RuleSet::new(&config.rules));
    let rounds: Vec<(f64, f64)> = (0..ROUNDS)
        .map(|_| {
            stand.flush();
            let writer = Writer::new(config.redis.clone(), Arc::clone(&rules), Arc::new(Metrics::new()));
            let seconds = runtime().block_on(write(writer.expect("a writer"), &batches, checkpoint(&rules)));
            (keys as f64 / seconds, stand.redis_benchmark(keys, VALUE_BYTES))
        })
        .collect();
    let (value, baseline) = (median(&rounds, |round| round.0), median(&rounds, |round| round.1));
    Figure::ratio_at_least("the cache side alone (keys/s)", value, baseline, 1.0)
}

fn batch(numbers: std::ops::Range<usize>, limits: Limits) -> Batch {
    let mut batch = Batch::new(limits, 1);
    for number in numbers {
        let key = format!("bench:r:{number}");
        let cell = batch.cell(0, |out| {
            out.extend_from_slice(key.as_bytes());
            true
        });
        let value = |out: &mut Vec<u8>| {
            out.resize(out.len() + VALUE_BYTES, b'x');
            Ok::<_, ()>(())
        };
        batch.set(cell.expect("a key"), Form::String, Life::Forever, false, value).expect("a value");
    }
    batch
}

/// One batch after the other; gives the seconds.
async fn write(mut writer: Writer, batches: &[Batch], mut checkpoint: Checkpoint) -> f64 {
    writer.claim(None).await.expect("an empty Redis");
    let began = Instant::now();
    for batch in batches {
        checkpoint = writer.apply(batch, checkpoint).await.expect("an applied batch").checkpoint;
    }
    began.elapsed().as_secs_f64()
}
