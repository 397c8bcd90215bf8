//! The commands as people and scripts use them: output, exit codes, and what they leave alone.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

use crate::support::{Daemon, Stage, reads_outbox, wait_for};

const RULES: &str = r#"
[rule.product]
table   = "public.products"
key     = "product:{id}"
value   = "json"
columns = ["id", "name", "price"]

[rule.lists]
table  = "public.products"
delete = ["products:all"]
"#;
const TABLE: &str = "create table products (id int primary key, name text, price numeric)";

fn keepstep(stage: &Stage, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_keepstep")).args(arguments).current_dir(stage.folder()).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn plan_shows_the_commands_of_a_change_without_any_server() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("keepstep.toml");
    let servers =
        "[postgres]\nurl = \"postgresql://nowhere\"\n[redis]\nurl = \"redis://nowhere\"\nprefix = \"shop:\"\n";
    std::fs::write(&rules, servers.to_owned() + RULES).unwrap();
    let plan = |change: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
        command.args(["plan", "-c"]).arg(&rules).arg(change).output().unwrap()
    };
    let cases = [
        (
            r#"{"table": "public.products", "new": {"id": 1, "name": "Pen \"x\"", "price": 1.50}}"#,
            "SET shop:product:1 \"{\\\"id\\\":1,\\\"name\\\":\\\"Pen \\\\\\\"x\\\\\\\"\\\",\\\"price\\\":1.50}\"\nUNLINK shop:products:all\n",
        ),
        (
            r#"{"table": "public.products", "old": {"id": 1}, "new": {"id": 2, "name": null, "price": 1}}"#,
            "SET shop:product:2 \"{\\\"id\\\":2,\\\"name\\\":null,\\\"price\\\":1}\"\nUNLINK shop:product:1 shop:products:all\n",
        ),
        (
            r#"{"table": "public.products", "old": {"id": 7, "name": "x", "price": 1}}"#,
            "UNLINK shop:product:7 shop:products:all\n",
        ),
    ];
    for (change, expected) in cases {
        let output = plan(change);
        assert_eq!(out(&output), expected, "{}", String::from_utf8_lossy(&output.stderr));
    }
    for bad in ["{", r#"{"table": "public.other", "new": {"id": 1}}"#, r#"{"table": "public.products"}"#] {
        let output = plan(bad);
        assert_eq!(output.status.code(), Some(1), "{bad}");
        assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: "), "{bad}");
    }
}

#[tokio::test]
async fn a_bad_rules_file_ends_every_command_with_78_before_anything_happens() {
    let stage = Stage::set();
    stage.rules("[rule.product]\ntable = \"public.products\"\nkey = \"{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\n");
    for command in [&["check"][..], &["run"], &["setup"], &["plan", "{}"], &["status"]] {
        let output = keepstep(&stage, command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{command:?}: {said}");
        assert!(said.contains("keepstep.toml:") && said.contains("help:"), "{said}");
    }
    assert_eq!(keepstep(&stage, &["run", "--no-such-flag"]).status.code(), Some(2));
}

#[tokio::test]
async fn rules_that_do_not_fit_the_tables_end_run_and_check_with_78() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    stage.rules(RULES);
    stage.keepstep(&["setup"]);
    stage.rules(&RULES.replace("\"price\"", "\"prize\""));
    for command in [&["run"][..], &["check", "--connect"]] {
        let output = keepstep(&stage, command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(78), "{command:?}: {said}");
        assert!(said.contains("`prize`") && said.contains("`price`"), "names the near one: {said}");
    }
}

#[tokio::test]
async fn status_tells_what_the_daemon_does() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let output = keepstep(&stage, &["status"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no daemon answers"));
    let daemon = Daemon::start(&stage, &rules).await;
    stage.execute("insert into products values (1, 'Pen', 1.50)").await;
    wait_for("catching up", async || (daemon.get("/ready?caught_up=1&warm=1").await?.0 == 200).then_some(())).await;
    let json: serde_json::Value = serde_json::from_str(&stage.keepstep(&["status", "-o", "json"])).unwrap();
    assert_eq!((&json["phase"], &json["database"]), (&"active".into(), &"postgres".into()), "{json}");
    assert_eq!((json["caught_up"].as_bool(), json["rules"].as_array().unwrap().len()), (Some(true), 2), "{json}");
    let table = stage.keepstep(&["status"]);
    assert!(table.contains("active") && table.contains("product on public.products: in step"), "{table}");
    assert_eq!(daemon.get("/live").await.unwrap().0, 200);
    assert!(
        daemon.get("/metrics").await.unwrap().1.contains("keepstep_commit_to_cache_seconds_count{rule=\"product\"} 1")
    );
}

#[tokio::test]
async fn a_dry_run_prints_commands_and_touches_neither_slot_nor_cache() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    let slots = match reads_outbox() {
        true => "select concat(confirmed_lsn, (select last_value from keepstep.gate)) from keepstep.state",
        false => {
            "select string_agg(slot_name || coalesce(confirmed_flush_lsn::text, ''), ',') from pg_replication_slots \
             where not temporary"
        }
    };
    let sql = stage.sql().await;
    let before: String = sql.query_one(slots, &[]).await.unwrap().get(0);
    let mut command = Command::new(env!("CARGO_BIN_EXE_keepstep"));
    command.args(["run", "--dry-run", "-c"]).arg(&rules).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut dry = command.spawn().unwrap();
    let mut log = BufReader::new(dry.stderr.take().unwrap()).lines();
    assert!(log.any(|line| line.unwrap().contains("printing the commands")));
    stage.execute("insert into products values (1, 'Pen', 1.50)").await;
    let mut printed = BufReader::new(dry.stdout.take().unwrap()).lines();
    let line = printed.next().unwrap().unwrap();
    assert_eq!(line, r#"SET test:product:1 "{\"id\":1,\"name\":\"Pen\",\"price\":1.50}""#);
    assert_eq!(printed.next().unwrap().unwrap(), "UNLINK test:products:all");
    assert!(Command::new("kill").args(["-TERM", &dry.id().to_string()]).status().unwrap().success());
    assert!(dry.wait().unwrap().success());
    let after: String = sql.query_one(slots, &[]).await.unwrap().get(0);
    assert_eq!(before, after);
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query_async(&mut stage.cache().await).await.unwrap();
    assert!(keys.is_empty(), "{keys:?}");
}

#[tokio::test]
async fn until_caught_up_drains_and_ends() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    let rules = stage.rules(RULES);
    stage.keepstep(&["setup"]);
    for round in 1..=3 {
        stage
            .execute(&format!("insert into products select {round} * 1000 + i, 'x', i from generate_series(1, 500) i"))
            .await;
        // Nothing that rules follow comes last.
        stage.execute("create table if not exists unrelated (id int); insert into unrelated values (1)").await;
        assert!(Daemon::spawn(&stage, &rules, &["--until-caught-up"]).end().await.success());
        let held: Option<String> = stage.get(&format!("product:{}", round * 1000 + 500)).await;
        assert!(held.is_some(), "round {round}");
    }
}

#[tokio::test]
async fn an_idle_slot_moves_although_only_another_database_is_written_to() {
    let stage = Stage::set();
    stage.execute(TABLE).await;
    stage.execute("create database busy").await;
    let rules = stage.rules(RULES);
    let text = std::fs::read_to_string(&rules).unwrap().replace("\n\n[redis]", "\nreplay_window = \"0s\"\n\n[redis]");
    std::fs::write(&rules, text).unwrap();
    stage.keepstep(&["setup"]);
    let _daemon = Daemon::start(&stage, &rules).await;
    let (busy, connection) = tokio_postgres::connect(&stage.postgres.url("busy"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    busy.batch_execute("create table t as select repeat('x', 100) from generate_series(1, 10000)").await.unwrap();
    let end: String = busy.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let sql = stage.sql().await;
    wait_for("the slot to move", async || {
        let query =
            format!("select confirmed_flush_lsn >= '{end}' from pg_replication_slots where slot_name = 'keepstep'");
        sql.query_one(&query, &[]).await.unwrap().get::<_, bool>(0).then_some(())
    })
    .await;
}

#[test]
fn a_pipeline_becomes_a_rules_file_and_the_rest_is_said_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let import = || Command::new(env!("CARGO_BIN_EXE_keepstep")).arg("import-rdi").arg(folder.path()).output().unwrap();
    let output = import();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::create_dir(folder.path().join("jobs")).unwrap();
    assert_eq!(import().status.code(), Some(2));

    let config = "sources: { shop: { connection: { type: postgresql, password: hunter2 } } }\n";
    std::fs::write(folder.path().join("config.yaml"), config).unwrap();
    let job = "source: { schema: public, table: invoice }\noutput:\n  - uses: redis.write\n    with:\n      nest: {}\n\
               \x20 - uses: redis.write\n    with:\n      key: { language: sql, expression: \"'invoice:' || id\" }\n";
    std::fs::write(folder.path().join("jobs/invoice.yaml"), job).unwrap();
    let output = import();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.starts_with("jobs/invoice.yaml:5: `nest` is not translated"), "{said}");
    let rules = out(&output);
    assert!(rules.contains("[rule.invoice]\n") && rules.contains("\"invoice:{id}\""), "{rules}");
    assert!(rules.contains("\"${DATABASE_URL}\"") && !rules.contains("hunter2"), "{rules}");
}

#[test]
fn codes_are_explained() {
    let explain = |code: &str| Command::new(env!("CARGO_BIN_EXE_keepstep")).args(["explain", code]).output().unwrap();
    assert!(out(&explain("ks72")).starts_with("KS072: "));
    let output = explain("KS999");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && said.starts_with("error: there is no code `KS999`\n\nhint: "), "{said}");
}

#[test]
fn completions_and_help_come_for_every_command() {
    let keepstep = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_keepstep")).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}");
        out(&output)
    };
    assert!(keepstep(&["completions", "bash"]).contains("until-caught-up"));
    for command in [
        "run",
        "init",
        "import-rdi",
        "check",
        "plan",
        "setup",
        "teardown",
        "warm",
        "verify",
        "reload",
        "status",
        "stats",
        "clear",
        "reference",
        "explain",
        "demo",
    ] {
        assert!(keepstep(&[command, "--help"]).contains("Usage: keepstep"), "{command}");
    }
}

#[tokio::test]
async fn a_database_without_an_encoding_is_refused() {
    let stage = Stage::set();
    stage.execute("create database bytes encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'").await;
    stage.rules_between(&stage.postgres.url("bytes"), &stage.redis.url(), RULES);
    let output = stage.run(&["run"]);
    assert_eq!(output.status.code(), Some(78));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("SQL_ASCII") && said.contains("ENCODING 'UTF8'"), "{said}");
}
