//! `make bench-micro`: what each step of the way costs in time and in memory, without a server.
//!
//! Steps that take a stream do a thousand changes an iteration: read µs as ns per change, KB as bytes per change and
//! Mitem/s as million rows a second. Keys and values are one an iteration. Buffers have grown before counting begins.

use std::fmt;

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use keepstep::decode::types::Types;
use keepstep::decode::value::write_json;
use keepstep::model::{Column, Datum, Relation, ReplicaIdentity};
use keepstep::rules::bind::{Rendered, bind};
use keepstep::rules::expression::{self, Expression, Images, Names, Scope, Truth, Wanted};
use tokio_postgres::types::Type;

use stream::{Action, NARROW, Operation, PGBENCH, Replay, Shape, Stream, WIDE};

#[expect(dead_code, reason = "the benchmark with servers uses the rest of it")]
mod stream;

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// A shape by its name in the table.
struct Named(&'static str, Shape);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

const SHAPES: [Named; 5] = [
    Named("narrow rows", NARROW),
    Named("pgbench updates", PGBENCH),
    Named("rows of 1 KB", WIDE),
    Named("delete rule", Shape { action: Action::Delete, ..NARROW }),
    Named("deleted rows", Shape { operation: Operation::Delete, ..NARROW }),
];

#[divan::bench(args = SHAPES)]
fn decode(bencher: Bencher<'_, '_>, Named(_, shape): &Named) {
    let stream = Stream::new(*shape);
    bencher.counter(ItemsCount::new(shape.changes)).bench_local(|| stream.decode());
}

/// Decoding, and taking what was decoded into a batch.
#[divan::bench(args = SHAPES)]
fn decode_and_plan(bencher: Bencher<'_, '_>, Named(_, shape): &Named) {
    let stream = Stream::new(*shape);
    let mut replay = Replay::new(&stream);
    replay.plan(&stream);
    bencher.counter(ItemsCount::new(shape.changes)).bench_local(|| replay.plan(&stream));
}

/// A planned batch into commands.
#[divan::bench(args = SHAPES)]
fn encode(bencher: Bencher<'_, '_>, Named(_, shape): &Named) {
    let stream = Stream::new(*shape);
    let mut replay = Replay::new(&stream);
    replay.run(&stream);
    bencher.counter(ItemsCount::new(shape.changes)).bench_local(|| replay.encode());
}

/// The whole way.
#[divan::bench(args = SHAPES)]
fn everything(bencher: Bencher<'_, '_>, Named(_, shape): &Named) {
    let stream = Stream::new(*shape);
    let mut replay = Replay::new(&stream);
    replay.run(&stream);
    bencher.counter(ItemsCount::new(shape.changes)).bench_local(|| replay.run(&stream));
}

#[divan::bench(args = ["{id}", "{id}:{name}", "{name|lower}", "{name|urlencode}", "{name|sha256}"])]
fn key(bencher: Bencher<'_, '_>, template: &str) {
    let config = stream::config(&format!("[rule.row]\ntable = \"public.rows\"\ndelete = [\"row:{template}\"]\n"));
    let relation = relation(&[("id", Type::INT8), ("name", Type::TEXT)]);
    let rule =
        bind(&config.rules[0], 0, &relation, None, &Types::builtin(), &config.redis.prefix).expect("a rule that fits");
    let row = [Datum::Text(b"1234567"), Datum::Text("Größe 42, blau".as_bytes())];
    let mut out = Vec::with_capacity(1024);
    bencher.bench_local(|| {
        out.clear();
        assert_eq!(rule.delete[0].render(black_box(&row), &mut out), Rendered::Done);
    });
}

fn relation(columns: &[(&str, Type)]) -> Relation {
    let column = |(name, ty): &(&str, Type)| Column {
        name: (*name).into(),
        type_oid: ty.oid(),
        type_modifier: -1,
        identity: true,
    };
    Relation {
        oid: 1,
        schema: "public".into(),
        name: "rows".into(),
        identity: ReplicaIdentity::Full,
        columns: columns.iter().map(column).collect(),
    }
}

/// Conditions that hold, so that nothing is cut short.
#[divan::bench(args = [
    "row.status == \"active\"",
    "row.status == \"active\" && row.amount > 10",
    "row.status in [\"new\", \"paid\", \"active\"]",
    "row.created_at > timestamp(\"2024-01-01T00:00:00Z\")",
    "row.data.kind == \"book\"",
    "\"sale\" in row.tags",
])]
fn condition(bencher: Bencher<'_, '_>, text: &str) {
    let relation = relation(&[
        ("status", Type::TEXT),
        ("amount", Type::NUMERIC),
        ("created_at", Type::TIMESTAMPTZ),
        ("data", Type::JSONB),
        ("tags", Type::TEXT_ARRAY),
    ]);
    let scope = Scope { relation: &relation, types: &Types::builtin(), names: Names::Row };
    let expression = Expression::parse(text).expect("an expression");
    let condition = expression::bind(&expression, &scope, Wanted::Condition).expect("a condition that fits");
    let row = [
        Datum::Text(b"active"),
        Datum::Text(b"12345.67"),
        Datum::Text(b"2024-02-29 12:00:00.123456+00"),
        Datum::Text(br#"{"kind": "book", "pages": 300}"#),
        Datum::Text(b"{new,sale}"),
    ];
    bencher.bench_local(|| {
        let images = Images::of_row(black_box(&row));
        assert_eq!(black_box(&condition).truth(&images), Truth::True);
    });
}

/// A column's value in Postgres's text form.
struct Value {
    name: &'static str,
    ty: Type,
    text: &'static str,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const VALUES: [Value; 7] = [
    Value { name: "int", ty: Type::INT4, text: "1234567" },
    Value { name: "numeric", ty: Type::NUMERIC, text: "-12345.678900" },
    Value { name: "timestamptz", ty: Type::TIMESTAMPTZ, text: "2024-02-29 12:00:00.123456+00" },
    Value { name: "text", ty: Type::TEXT, text: "Keeps Redis in step with Postgres: a line of 50 B." },
    Value { name: "text with escapes", ty: Type::TEXT, text: "\"Keeps\" Redis\tin \\ step with\nPostgres: a line, 50" },
    Value { name: "json", ty: Type::JSONB, text: r#"{"tags": ["a", "b"], "size": 42, "note": "fifty B"}"# },
    Value { name: "array", ty: Type::TEXT_ARRAY, text: r#"{plain,"two words","an \"escape\"",NULL,more,"x,y"}"# },
];

#[divan::bench(args = VALUES)]
fn json(bencher: Bencher<'_, '_>, value: &Value) {
    let types = Types::builtin();
    let json = &types.get(value.ty.oid()).json;
    let mut out = Vec::with_capacity(1024);
    bencher.bench_local(|| {
        out.clear();
        write_json(&mut out, black_box(json), black_box(value.text.as_bytes())).expect("a value of its type");
    });
}
