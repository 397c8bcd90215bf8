//! After any loss the cache becomes right again by itself, under load: no wrong key, no orphan, nothing touched that no
//! rule owns, and no version that goes back within an epoch.

use std::path::PathBuf;
use std::time::Duration;

use keepstep::cache::checkpoint::Checkpoint;

use crate::support::{
    Daemon, Load, Proxy, ROWS, RULES, Reader, Replica, Sentinels, Stage, Standby, assert_in_step, lasts, signal,
    wait_for,
};

/// Transactions a second: enough that there is always one under way.
const RATE: u32 = 800;
/// Rows that the load leaves alone: what is missing of them afterwards came from no change, but from a table.
const COLD: u32 = 3000;

/// A warm cache, an application that writes all the time, and one that reads.
struct Scene {
    // Whoever works on the stage leaves before it does.
    daemon: Daemon,
    load: Load,
    reader: Reader,
    sentinels: Sentinels,
    to_postgres: Proxy,
    to_redis: Proxy,
    stage: Stage,
}

impl Scene {
    /// On servers that may be replaced later; `postgres` are lines of the rules file.
    async fn set(stage: Stage, postgres: &str) -> Self {
        Load::prepare(&stage, COLD).await;
        let (to_postgres, to_redis) = (Proxy::to(stage.postgres.port).await, Proxy::to(stage.redis.port).await);
        let rules = rules(&stage, &to_postgres, &to_redis, postgres);
        stage.keepstep(&["setup"]);
        let daemon = Daemon::start(&stage, &rules).await;
        warmed(&stage, 0).await;
        assert_in_step(&stage, &[ROWS]).await;
        let reader = Reader::follow_within_epochs(&redis_url(&to_redis), Load::keys());
        let sentinels = Sentinels::place(&stage).await;
        let load = Load::begin(&stage, &stage.postgres, RATE);
        load.goes_on(&stage).await;
        Scene { stage, to_postgres, to_redis, daemon, load, reader, sentinels }
    }

    async fn epoch(&self) -> u64 {
        self.stage.checkpoint().await.unwrap().epoch
    }

    /// Fills a key that a row change would make stale, as an application does that missed it.
    async fn fill(&self, bucket: u32) {
        self.stage.put(&format!("list:{bucket}"), "filled").await;
    }

    async fn is_filled(&self, bucket: u32) -> bool {
        self.stage.get::<Option<String>>(&format!("list:{bucket}")).await.is_some()
    }

    /// The cache has healed while the load goes on; behind that, everything is right.
    async fn heals(self, before: u64) {
        warmed(&self.stage, before + 1).await;
        self.load.goes_on(&self.stage).await;
        self.turns_out_right().await;
    }

    async fn turns_out_right(self) {
        self.load.finish(&self.stage);
        assert_in_step(&self.stage, &[ROWS]).await;
        self.sentinels.assert_untouched(&self.stage).await;
        let versions = self.reader.finish().await;
        assert!(versions > 10, "hardly anything was read: {versions} versions");
        assert!(self.daemon.terminate().await.success());
    }
}

fn redis_url(proxy: &Proxy) -> String {
    format!("redis://127.0.0.1:{}/", proxy.port)
}

fn rules(stage: &Stage, to_postgres: &Proxy, to_redis: &Proxy, postgres: &str) -> PathBuf {
    let postgres_url = format!("postgresql://postgres@127.0.0.1:{}/postgres", to_postgres.port);
    let rules = stage.rules_between(&postgres_url, &redis_url(to_redis), RULES);
    stage.set_fields("[postgres]", postgres);
    rules
}

/// Waits for an epoch that began at `epoch` or later and in which no rule owes anything any more.
async fn warmed(stage: &Stage, epoch: u64) -> Checkpoint {
    wait_for("a cache that owes nothing", async || {
        let checkpoint = stage.checkpoint().await?;
        (checkpoint.epoch >= epoch && checkpoint.owing.is_empty()).then_some(checkpoint)
    })
    .await
}

async fn flushall(stage: &Stage) {
    let () = redis::cmd("FLUSHALL").query_async(&mut stage.cache().await).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn after_flushall() {
    let mut scene = Scene::set(Stage::set(), "").await;
    let before = scene.epoch().await;
    flushall(&scene.stage).await;
    scene.sentinels = Sentinels::place(&scene.stage).await;
    scene.heals(before).await;
}

/// Nothing is written that would show the loss.
#[tokio::test]
async fn after_flushall_on_an_idle_system() {
    let stage = Stage::set();
    Load::prepare(&stage, COLD).await;
    let path = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &path).await;
    let before = warmed(&stage, 0).await.epoch;
    flushall(&stage).await;
    warmed(&stage, before + 1).await;
    assert_in_step(&stage, &[ROWS]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_redis_came_back_empty() {
    let mut scene = Scene::set(Stage::set(), "").await;
    let before = scene.epoch().await;
    scene.stage.redis.stop("KILL").unwrap();
    scene.stage.redis.resume().unwrap();
    scene.sentinels = Sentinels::place(&scene.stage).await;
    scene.heals(before).await;
}

/// What the slot still holds is replayed: deletes that the replica lost are done again, and other keys stay.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_to_a_replica_that_was_cut_off_for_3_s() {
    let scene = fail_over("replay_window = \"30s\"").await;
    assert!(scene.is_filled(Load::COLD_BUCKET).await, "a replay leaves alone what no change made stale");
    // Now one does.
    change_cold_rows(&scene.stage).await;
    scene.turns_out_right().await;
}

/// Nothing that the replica lost can be replayed: the tables say what is right.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_that_the_slot_cannot_bridge() {
    let scene = fail_over("replay_window = \"0s\"").await;
    assert!(!scene.is_filled(Load::COLD_BUCKET).await, "after a gap no such key can be trusted");
    scene.turns_out_right().await;
}

/// Fails over and waits until the cache has healed. A key of bucket 7777 was made stale while the replica was cut off.
async fn fail_over(postgres: &str) -> Scene {
    let mut scene = Scene::set(Stage::set_with("", Replica::PRIMARY), postgres).await;
    let before = scene.epoch().await;
    scene.fill(7777).await;
    scene.fill(Load::COLD_BUCKET).await;
    let replica = Replica::of(&scene.stage).await;
    replica.cut_off();
    scene.stage.execute("insert into rows values (-1, 1, 7777, 'new')").await;
    wait_for("the primary's key to go", async || (!scene.is_filled(7777).await).then_some(())).await;
    lasts(Duration::from_secs(3)).await;
    replica.promote(&mut scene.stage).await;
    scene.to_redis.retarget(scene.stage.redis.port);
    warmed(&scene.stage, before + 1).await;
    scene.load.goes_on(&scene.stage).await;
    wait_for("the replica's key to go", async || (!scene.is_filled(7777).await).then_some(())).await;
    scene
}

/// Changes rows that the load leaves alone: one goes, one is another, one is new.
async fn change_cold_rows(stage: &Stage) {
    let (gone, changed, new) = (Load::COLD, Load::COLD + 1, Load::COLD + COLD);
    let changes = format!(
        "delete from rows where id = {gone}; update rows set version = 2, filler = 'changed' where id = {changed};
         insert into rows values ({new}, 1, {}, 'new')",
        Load::COLD_BUCKET
    );
    stage.execute(&changes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_the_slot_was_dropped() {
    let scene = Scene::set(Stage::set(), "").await;
    let before = scene.epoch().await;
    scene.fill(Load::COLD_BUCKET).await;
    // Stopped, so that what changes while there is no slot is in no stream for certain.
    signal(scene.daemon.pid(), "STOP");
    let sql = scene.stage.sql().await;
    wait_for("the slot to go", async || {
        let end = "select pg_terminate_backend(active_pid) from pg_replication_slots where active_pid is not null";
        sql.batch_execute(end).await.unwrap();
        sql.batch_execute("select pg_drop_replication_slot('keepstep')").await.ok()
    })
    .await;
    change_cold_rows(&scene.stage).await;
    signal(scene.daemon.pid(), "CONT");
    warmed(&scene.stage, before + 1).await;
    assert!(!scene.is_filled(Load::COLD_BUCKET).await, "after a gap no such key can be trusted");
    scene.heals(before).await;
}

/// The standby lacks commits that are in the cache: their keys go back, in a new epoch.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_lagging_standby_was_promoted() {
    let mut stage = Stage::set();
    let standby = Standby::asynchronous(&mut stage).await;
    let mut scene = Scene::set(stage, "").await;
    let before = scene.epoch().await;
    scene.fill(Load::COLD_BUCKET).await;
    standby.stall();
    change_cold_rows(&scene.stage).await;
    wait_for("the changes in the cache", async || {
        let held: Option<String> = scene.stage.get(&format!("row:{}", Load::COLD + 1)).await;
        held?.contains("changed").then_some(())
    })
    .await;
    standby.promote(&mut scene.stage).await;
    scene.to_postgres.retarget(scene.stage.postgres.port);
    scene.load = Load::begin(&scene.stage, &scene.stage.postgres, RATE);
    warmed(&scene.stage, before + 1).await;
    assert!(!scene.is_filled(Load::COLD_BUCKET).await, "after a gap no such key can be trusted");
    let lost: Option<String> = scene.stage.get(&format!("row:{}", Load::COLD + COLD)).await;
    assert_eq!(lost, None, "the row is in no table of this history");
    scene.heals(before).await;
}

/// `kill -9` at random moments while the cache is filled for the first time; `KEEPSTEP_SOAK=1` makes it fifty.
#[tokio::test(flavor = "multi_thread")]
async fn after_kills_in_mid_warm() {
    const ROWS_TOTAL: u32 = 20_000;
    let kills: u32 = if std::env::var_os("KEEPSTEP_SOAK").is_some() { 50 } else { 5 };
    let stage = Stage::set();
    Load::prepare(&stage, ROWS_TOTAL).await;
    let rules = stage.rules(RULES);
    // So slow that it outlives the kills, which come 300 ms apart on average.
    stage.set_fields("[postgres]", &format!("warm_rate = \"{}/s\"", ROWS_TOTAL * 10 / 4 / kills));
    stage.keepstep(&["setup"]);
    let load = Load::begin(&stage, &stage.postgres, RATE);
    let reader = Reader::follow_within_epochs(&stage.redis.url(), Load::keys());
    let sentinels = Sentinels::place(&stage).await;
    let mut in_mid_warm = 0;
    let mut daemon = Daemon::start(&stage, &rules).await;
    let epoch = stage.checkpoint().await.unwrap().epoch;
    for _ in 0..kills {
        lasts(Duration::from_millis(u64::from(getrandom::u32().unwrap() % 600))).await;
        daemon.kill();
        in_mid_warm += u32::from(!stage.checkpoint().await.unwrap().owing.is_empty());
        daemon = Daemon::start(&stage, &rules).await;
    }
    assert!(in_mid_warm > kills / 2, "only {in_mid_warm} of {kills} kills came in mid-warm");
    assert_eq!(warmed(&stage, 0).await.epoch, epoch, "a kill is no gap");
    load.finish(&stage);
    assert_in_step(&stage, &[ROWS]).await;
    sentinels.assert_untouched(&stage).await;
    assert!(reader.finish().await > 10);
    drop(daemon);
}

/// A start in mid-warm goes on where the one before was, and says how far it is.
#[tokio::test]
async fn a_warm_goes_on_where_it_was() {
    const ROWS_TOTAL: u32 = 20_000;
    let stage = Stage::set();
    Load::prepare(&stage, ROWS_TOTAL).await;
    let rules = stage.rules(RULES);
    stage.set_fields("[postgres]", "warm_rate = \"8000/s\"");
    stage.keepstep(&["setup"]);
    let first = Daemon::start(&stage, &rules).await;
    let mut cache = stage.cache().await;
    let half = usize::try_from(ROWS_TOTAL / 2).unwrap();
    wait_for("half of the keys", async || {
        let keys: usize = redis::cmd("DBSIZE").query_async(&mut cache).await.unwrap();
        (keys > half).then_some(())
    })
    .await;
    first.kill();
    let second = Daemon::start(&stage, &rules).await;
    assert_eq!(second.get("/ready?warm=1").await.unwrap().0, 503, "it is not warm yet");
    wait_for("the warm cache", async || (second.get("/ready?warm=1").await?.0 == 200).then_some(())).await;
    let read = second.metric("keepstep_warm_rows_total").await.unwrap();
    assert!(read < 0.75 * f64::from(ROWS_TOTAL), "{read} rows were read once more");
    assert_in_step(&stage, &[ROWS]).await;
}
