//! The reader of tables alone, before a session that takes nothing: while Redis is away, no snapshot is held for long.

use std::sync::Arc;
use std::time::Duration;

use keepstep::batch::{CellHasher, Limits};
use keepstep::cache::checkpoint::Origin;
use keepstep::catalog::{self, Carrier};
use keepstep::config::{self, TableName};
use keepstep::decode::types::Types;
use keepstep::error::ErrorKind;
use keepstep::plan::BoundTable;
use keepstep::rules::bind::bind;
use keepstep::snapshot::reader::{self, Found, Handle, Setting, TableJob};
use keepstep::source::conninfo::ConnInfo;

use crate::support::{Stage, wait_for};

const RULE: &str = "[rule.row]\ntable = \"public.rows\"\nkey = \"row:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\n";

/// Rows of a piece.
const PIECE: usize = 10;

/// A reader of so many rows, which are one chunk.
async fn reader_of(stage: &Stage, rows: usize) -> Handle {
    let sql = stage.sql().await;
    let table = format!("create table rows (id int primary key); insert into rows select generate_series(1, {rows})");
    sql.batch_execute(&table).await.unwrap();
    let (config, _) = config::load(&stage.rules(RULE), &|_| None).unwrap();
    stage.keepstep(&["setup"]);
    let name = TableName { schema: "public".into(), name: "rows".into() };
    let catalog = catalog::load(&sql, &Carrier::of(&config.postgres), std::slice::from_ref(&name)).await.unwrap();
    let facts = &catalog.tables[&name];
    let types = Types::load(&sql, &catalog.type_oids()).await.unwrap();
    let rule = bind(&config.rules[0], 0, &facts.relation, Some(facts), &types, &config.redis.prefix).unwrap();
    let system = "select system_identifier::text from pg_control_system()";
    let handle = reader::start(Setting {
        postgres: ConnInfo::from_config(&config.postgres).unwrap(),
        carrier: Carrier::of(&config.postgres),
        origin: Origin {
            system: sql.query_one(system, &[]).await.unwrap().get(0),
            timeline: 1,
            database: "postgres".into(),
            slot: config.postgres.slot.clone(),
        },
        redis: config.redis.clone(),
        limits: Limits { ops: PIECE, bytes: 1 << 20 },
        rules: 1,
        config: Arc::new(config),
        hasher: CellHasher::default(),
        token: "token".into(),
        rows_per_s: None,
    });
    let job = TableJob {
        table: BoundTable { relation: facts.relation.clone(), rules: vec![rule] },
        verifies: false,
        filter: None,
        sample: 1.0,
        from: None,
        search: None,
        listings: Vec::new(),
        fills: true,
        barrier: false,
    };
    handle.tables.try_send(job).unwrap_or_else(|_| panic!("the reader has ended"));
    handle
}

/// Takes what is found until the chunk has begun. Of what is read from then on, two pieces find room.
async fn begun(handle: &mut Handle) {
    loop {
        match handle.found.recv().await.unwrap() {
            Found::Begin(answer) => answer.send(Vec::new()).unwrap(),
            Found::Part(answer) => answer.send(()).unwrap(),
            Found::Opened(_) => return,
            Found::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
}

/// Whether a snapshot, or a lock on the table, is held.
async fn holds(sql: &tokio_postgres::Client) -> bool {
    let held = "select exists (select from pg_locks where relation = 'rows'::regclass)
        or exists (select from pg_stat_activity where backend_xmin is not null and pid <> pg_backend_pid()
                                                  and backend_type = 'client backend')";
    sql.query_one(held, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn the_last_piece_of_a_chunk_waits_without_a_snapshot() {
    let stage = Stage::set();
    let mut handle = reader_of(&stage, 2 * PIECE + 1).await;
    begun(&mut handle).await;
    let sql = stage.sql().await;
    wait_for("snapshot and lock to be given back", async || (!holds(&sql).await).then_some(())).await;
    assert!(!handle.tables.is_closed(), "the reader has ended");
}

/// Half a minute long: that is how long a piece may wait.
#[tokio::test]
async fn a_chunk_that_has_more_to_say_is_given_up() {
    let stage = Stage::set();
    let mut handle = reader_of(&stage, 4 * PIECE).await;
    begun(&mut handle).await;
    let ended = tokio::time::timeout(Duration::from_secs(60), handle.tables.closed());
    ended.await.expect("the reader goes on waiting");
    let sql = stage.sql().await;
    wait_for("snapshot and lock to be given back", async || (!holds(&sql).await).then_some(())).await;
    let mut found = Vec::new();
    while let Some(one) = handle.found.recv().await {
        found.push(one);
    }
    let [Found::Piece(_), Found::Piece(_), Found::Failed(error)] = found.as_slice() else {
        panic!("{} things were found", found.len())
    };
    assert_eq!(error.kind(), ErrorKind::RedisAway);
}
