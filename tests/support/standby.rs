//! A streaming standby of the stage's Postgres: one that commits wait for, or one that comes to be the primary.

use keepstep::sandbox::Postgres;
use tokio_postgres::{Client, NoTls};

use super::{Proxy, Stage, wait_for};

const NAME: &str = "standby";

/// A standby, and the link that it receives its log through.
pub(crate) struct Standby {
    postgres: Postgres,
    link: Proxy,
}

impl Standby {
    /// One that no commit waits for.
    pub(crate) async fn asynchronous(stage: &mut Stage) -> Self {
        Self::of(stage, "").await
    }

    /// One that every commit waits for, unless its `synchronous_commit` says otherwise.
    pub(crate) async fn synchronous(stage: &mut Stage) -> Self {
        Self::of(stage, &format!("synchronous_standby_names = '{NAME}'")).await
    }

    async fn of(stage: &mut Stage, settings: &str) -> Self {
        let link = Proxy::to(stage.postgres.port).await;
        let standby = Standby { postgres: stage.postgres.standby(NAME, link.port, settings).unwrap(), link };
        let sql = stage.sql().await;
        wait_for("the standby to stream", async || {
            let streaming =
                "select count(*) = 1 from pg_stat_replication where application_name = $1 and state = 'streaming'";
            sql.query_one(streaming, &[&NAME]).await.unwrap().get::<_, bool>(0).then_some(())
        })
        .await;
        standby
    }

    /// Waits until it has received the log up to here.
    pub(crate) async fn has_received(&self, lsn: &str) {
        let sql = self.sql().await;
        let received = format!("select pg_last_wal_receive_lsn() >= '{lsn}'");
        wait_for("the standby to receive", async || {
            sql.query_one(&received, &[]).await.unwrap().get::<_, bool>(0).then_some(())
        })
        .await;
    }

    /// From now on it receives nothing: commits that wait for it are flushed and decoded, but nobody sees them.
    pub(crate) fn stall(&self) {
        self.link.stall();
    }

    /// It receives what it was kept from.
    pub(crate) fn resume(&self) {
        self.link.resume();
    }

    /// Ends the primary as a crash does. The standby takes its place on the stage, with what it has received until now.
    pub(crate) async fn promote(self, stage: &mut Stage) {
        stage.postgres.stop("QUIT").unwrap();
        let sql = self.sql().await;
        // With the link goes what it held back.
        drop(self.link);
        let promoted: bool = sql.query_one("select pg_promote()", &[]).await.unwrap().get(0);
        assert!(promoted, "the standby was not promoted in time");
        stage.postgres = self.postgres;
    }

    async fn sql(&self) -> Client {
        let (sql, connection) = tokio_postgres::connect(&self.postgres.url("postgres"), NoTls).await.unwrap();
        tokio::spawn(connection);
        sql
    }
}

/// A transaction whose COMMIT waits for a stalled standby: flushed and decoded, invisible to everybody.
pub(crate) struct Stalled {
    commit: tokio::task::JoinHandle<()>,
}

impl Stalled {
    /// Executes the statement, and waits until its COMMIT waits.
    pub(crate) async fn execute(stage: &Stage, statement: &str) -> Self {
        let (sql, statement) = (stage.sql().await, statement.to_owned());
        let pid: i32 = sql.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
        let commit = tokio::spawn(async move { sql.batch_execute(&statement).await.unwrap() });
        let observer = stage.sql().await;
        wait_for("a COMMIT that waits for the standby", async || {
            let waits = "select wait_event = 'SyncRep' from pg_stat_activity where pid = $1";
            let waits: Option<bool> = observer.query_one(waits, &[&pid]).await.unwrap().get(0);
            waits.unwrap_or(false).then_some(())
        })
        .await;
        Stalled { commit }
    }

    /// Waits for the end of the COMMIT, behind [`Standby::resume`].
    pub(crate) async fn done(self) {
        self.commit.await.unwrap();
    }
}
