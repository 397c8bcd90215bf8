//! A replica of the stage's Redis, and the link to it: failing over loses what did not come through.

use keepstep::sandbox::RedisServer;

use super::stage::connect;
use super::{Proxy, Stage, wait_for};

/// A replica, and the link that it receives writes through.
pub(crate) struct Replica {
    redis: RedisServer,
    link: Proxy,
}

impl Replica {
    /// What the primary's command line needs, or the first synchronisation takes five seconds.
    pub(crate) const PRIMARY: &[&str] = &["--repl-diskless-sync-delay", "0"];

    /// A replica of the stage's Redis that has everything that is there now.
    pub(crate) async fn of(stage: &Stage) -> Self {
        let link = Proxy::to(stage.redis.port).await;
        let redis = RedisServer::start(&["--replicaof", "127.0.0.1", &link.port.to_string()]).unwrap();
        let replica = Replica { redis, link };
        let mut cache = connect(&replica.redis).await;
        wait_for("the replica to be in step", async || {
            let info: String = redis::cmd("INFO").arg("replication").query_async(&mut cache).await.unwrap();
            info.contains("master_link_status:up").then_some(())
        })
        .await;
        replica
    }

    /// From now on it receives nothing.
    pub(crate) fn cut_off(&self) {
        self.link.stall();
    }

    /// Ends the primary as a crash does. The replica takes its place on the stage, with what it has received until now.
    pub(crate) async fn promote(self, stage: &mut Stage) {
        stage.redis.stop("KILL").unwrap();
        let mut cache = connect(&self.redis).await;
        // With the link goes what it held back.
        drop(self.link);
        let () = redis::cmd("REPLICAOF").arg("NO").arg("ONE").query_async(&mut cache).await.unwrap();
        stage.redis = self.redis;
    }
}
