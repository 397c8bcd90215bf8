//! How the cost of a change grows with rules, columns, bytes and tables: no faster than they do.
//!
//! In memory, through decoding, planning and the encoding of commands. Sizes take turns, the median round counts, and
//! the second smallest size is the reference: at the smallest, what a change costs by itself outweighs the rest.

use std::time::{Duration, Instant};

use crate::stream::{NARROW, Replay, Shape, Stream};
use crate::{Figure, median};

const ROUNDS: usize = 5;
/// How long one size is measured in one round.
const SPAN: Duration = Duration::from_millis(250);
const SPAN_QUICK: Duration = Duration::from_millis(60);
/// How much dearer than at the reference a unit may be. A thousand tables, or a row of 1 MB, are more than the
/// processor's nearest caches hold; that costs something however linear the code is.
const FACTOR_MAX: f64 = 1.2;

/// Something that a change, or the daemon, can have more of.
struct Cause {
    plural: &'static str,
    sizes: &'static [usize],
    /// A stream of changes that have so much of it.
    shape: fn(usize) -> Shape,
    /// What the cost is divided by, and how much of it there is in one change.
    unit: &'static str,
    in_a_change: fn(usize) -> usize,
}

const CAUSES: [Cause; 4] = [
    Cause {
        plural: "rules",
        sizes: &[1, 10, 100, 1000],
        shape: |rules| Shape { rules, changes: 4000 / rules, ..NARROW },
        unit: "rule",
        in_a_change: |rules| rules,
    },
    Cause {
        plural: "columns",
        sizes: &[5, 50, 500],
        shape: |columns| Shape {
            integers: columns.div_ceil(2),
            texts: columns / 2,
            changes: 10_000 / columns,
            ..NARROW
        },
        unit: "column",
        in_a_change: |columns| columns,
    },
    Cause {
        plural: "bytes",
        sizes: &[100, 10_000, 100_000, 1_000_000],
        shape: |text_bytes| Shape { text_bytes, changes: (4_000_000 / text_bytes).min(1000), ..NARROW },
        unit: "byte",
        in_a_change: |text_bytes| text_bytes,
    },
    Cause {
        plural: "tables",
        sizes: &[1, 10, 100, 1000],
        shape: |tables| Shape { tables, ..NARROW },
        unit: "change",
        in_a_change: |_| 1,
    },
];

pub(crate) fn measure(quick: bool) -> Vec<Figure> {
    let span = if quick { SPAN_QUICK } else { SPAN };
    CAUSES.iter().flat_map(|cause| cause.figures(span)).collect()
}

impl Cause {
    /// Every other size beside the reference.
    fn figures(&self, span: Duration) -> Vec<Figure> {
        let mut sizes: Vec<Size> = self.sizes.iter().map(|size| Size::new(self, *size)).collect();
        for _ in 0..ROUNDS {
            sizes.iter_mut().for_each(|size| size.round(span));
        }
        let cost = |size: Size| (size.size, median(&size.rounds_ns, |ns| *ns));
        let costs: Vec<(usize, f64)> = sizes.into_iter().map(cost).collect();
        let (reference, baseline) = costs[1];
        let figure = |(size, value): (usize, f64)| {
            let measure = format!("{size} {} against {reference}: ns per {}", self.plural, self.unit);
            match size < reference {
                true => Figure::shown(measure, value, baseline),
                false => Figure::ratio_at_most(measure, value, baseline, FACTOR_MAX),
            }
        };
        costs.into_iter().filter(|(size, _)| *size != reference).map(figure).collect()
    }
}

/// One size of a cause, and what its rounds took.
struct Size {
    size: usize,
    stream: Stream,
    replay: Replay,
    /// Of the cause, in the whole stream.
    units: usize,
    rounds_ns: Vec<f64>,
}

impl Size {
    fn new(cause: &Cause, size: usize) -> Self {
        let shape = (cause.shape)(size);
        let stream = Stream::new(shape);
        let mut replay = Replay::new(&stream);
        // The buffers grow.
        replay.run(&stream);
        Size { size, stream, replay, units: shape.changes * (cause.in_a_change)(size), rounds_ns: Vec::new() }
    }

    /// Takes the stream again and again for this long.
    fn round(&mut self, span: Duration) {
        let (began, mut units) = (Instant::now(), 0);
        while began.elapsed() < span {
            std::hint::black_box(self.replay.run(&self.stream));
            units += self.units;
        }
        self.rounds_ns.push(began.elapsed().as_secs_f64() * 1e9 / units as f64);
    }
}
