//! pgbench with a workload of its own: rows come, change, change their keys and go, and the version of a key only grows.

use std::process::{Child, Stdio};

use keepstep::sandbox::Postgres;

use super::{Mirror, Stage, wait_for};

/// The rules for [`Load::TABLE`]: one that writes keys, and one that only makes keys stale.
pub(crate) const RULES: &str = r#"
[rule.row]
table   = "public.rows"
key     = "row:{id}"
value   = "json"
columns = ["id", "version", "filler"]

[rule.list]
table  = "public.rows"
delete = ["list:{bucket}"]
"#;

/// What the first of them makes.
pub(crate) const ROWS: Mirror<'_> = Mirror { table: "rows", key: "'row:' || id", columns: "id, version, filler" };

/// Each client of pgbench has rows of its own, so that a version from a sequence is greater than the one before;
/// all of them fight for the ten hot rows.
const SCRIPTS: [(&str, &str); 4] = [
    ("hot@4", "\\set id random(0, 9)\nupdate rows set version = version + 1 where id = :id;\n"),
    (
        "written@4",
        "\\set id 100 + :client_id + 4 * random(0, 99)\n\
         insert into rows values (:id, nextval('versions'), :id % 10, 'written')\
         on conflict (id) do update set version = excluded.version;\n",
    ),
    ("removed@1", "\\set id 100 + :client_id + 4 * random(0, 224)\ndelete from rows where id = :id;\n"),
    (
        "moved@1",
        "\\set id 100 + :client_id + 4 * random(0, 99)\n\
         update rows set id = id + 500, version = nextval('versions')\
         where id = :id and not exists (select from rows where id = :id + 500);\n",
    ),
];
/// As the scripts above count them.
const CLIENTS: &str = "4";

/// A running pgbench; ended when dropped.
pub(crate) struct Load {
    pgbench: Child,
}

impl Load {
    /// The first row that the load leaves alone.
    pub(crate) const COLD: u32 = 1000;
    /// The bucket of all those.
    pub(crate) const COLD_BUCKET: u32 = 99;

    /// Makes the table, with so many rows that the load leaves alone.
    pub(crate) async fn prepare(stage: &Stage, cold: u32) {
        let (from, to, bucket) = (Self::COLD, Self::COLD + cold - 1, Self::COLD_BUCKET);
        let statements = format!(
            "create sequence versions start {from};
             create table rows (id int primary key, version bigint not null, bucket int not null, filler text);
             alter table rows replica identity full;
             insert into rows select id, 1, id % 10, repeat('x', 100) from generate_series(0, 499) id;
             insert into rows select id, 1, {bucket}, repeat('x', 100) from generate_series({from}, {to}) id;"
        );
        stage.execute(&statements).await;
    }

    /// Begins, with so many transactions a second.
    pub(crate) fn begin(stage: &Stage, postgres: &Postgres, rate: u32) -> Self {
        let mut pgbench = postgres.command("pgbench");
        pgbench.args(["-n", "-c", CLIENTS, "-j", "1", "-T", "3600", "-R", &rate.to_string()]);
        for (script, text) in SCRIPTS {
            let (name, _) = script.split_once('@').unwrap();
            std::fs::write(stage.folder().join(name), text).unwrap();
            pgbench.arg("-f").arg(stage.folder().join(script));
        }
        let said = std::fs::File::create(stage.folder().join("pgbench.log")).unwrap();
        Load { pgbench: pgbench.stdout(Stdio::null()).stderr(said).spawn().unwrap() }
    }

    /// Waits until it has committed some more.
    pub(crate) async fn goes_on(&self, stage: &Stage) {
        let sql = stage.sql().await;
        let taken = async || sql.query_one("select last_value from versions", &[]).await.unwrap().get::<_, i64>(0);
        let before = taken().await;
        wait_for("the load", async || (taken().await > before + 100).then_some(())).await;
    }

    /// Ends it. It must still have been running.
    pub(crate) fn finish(mut self, stage: &Stage) {
        if let Some(status) = self.pgbench.try_wait().unwrap() {
            let said = std::fs::read_to_string(stage.folder().join("pgbench.log")).unwrap();
            panic!("pgbench ended by itself: {status}\n{said}");
        }
    }

    /// Keys that it changes all the time, and some that it does not.
    pub(crate) fn keys() -> Vec<String> {
        (0..10).chain(100..120).chain(Self::COLD..Self::COLD + 5).map(|id| format!("row:{id}")).collect()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.pgbench.kill();
        let _ = self.pgbench.wait();
    }
}
