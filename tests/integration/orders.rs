//! What is asked of a running daemon: to take over a changed rules file, and commands that it must not obey.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::{Daemon, Mirror, Proxy, Stage, assert_in_step, wait_for};

const TABLES: &str = "create table products (id int primary key, name text); \
                      create table orders (id int primary key, total numeric)";

/// A rule that writes the rows of a table.
fn rule(name: &str, table: &str, columns: &str) -> String {
    format!(
        "[rule.{name}]\ntable = \"public.{table}\"\nkey = \"{name}:{{id}}\"\nvalue = \"json\"\ncolumns = [{columns}]\n\n"
    )
}

fn product() -> String {
    rule("product", "products", "\"id\", \"name\"")
}

fn order() -> String {
    rule("order", "orders", "\"id\", \"total\"")
}

const PRODUCTS: Mirror<'_> = Mirror { table: "products", key: "'product:' || id", columns: "id, name" };
const ORDERS: Mirror<'_> = Mirror { table: "orders", key: "'order:' || id", columns: "id, total" };

/// Tables, a publication of both, and a daemon that follows the first.
async fn stand(stage: &Stage) -> Daemon {
    stage.execute(TABLES).await;
    stage.rules(&(product() + &order()));
    stage.keepstep(&["setup"]);
    let rules = stage.rules(&product());
    Daemon::start(stage, &rules).await
}

/// Waits until the daemon streams under rules of these names.
async fn follows(daemon: &Daemon, names: &[&str]) {
    wait_for("the rules to be in force", async || {
        let status: Value = serde_json::from_str(&daemon.get("/status").await?.1).ok()?;
        let rules: Vec<&str> = status["rules"].as_array()?.iter().filter_map(|rule| rule["name"].as_str()).collect();
        (rules == names && status["phase"] == "active").then_some(())
    })
    .await;
}

fn hang_up(daemon: &Daemon) {
    assert!(Command::new("kill").args(["-HUP", &daemon.pid().to_string()]).status().unwrap().success());
}

/// Adds lines to [postgres].
fn with_postgres(rules: &Path, lines: &str) {
    let text = std::fs::read_to_string(rules).unwrap().replace("\n\n[redis]", &format!("\n{lines}\n\n[redis]"));
    std::fs::write(rules, text).unwrap();
}

#[tokio::test]
async fn a_changed_rules_file_is_taken_over_without_a_restart_and_loses_nothing() {
    let stage = Stage::set();
    let daemon = stand(&stage).await;
    stage.execute("insert into products values (1, 'Pen')").await;
    assert_in_step(&stage, &[PRODUCTS]).await;

    stage.rules(&(product() + &order()));
    // Changes go on while the daemon changes over.
    let writer = async {
        for id in 2..200 {
            stage.execute(&format!("insert into products values ({id}, 'x')")).await;
        }
    };
    let ((), answer) = tokio::join!(writer, daemon.post("/reload", ""));
    assert_eq!(answer, Some((200, r#"{"rules":2,"notes":[]}"#.to_owned())));
    follows(&daemon, &["product", "order"]).await;
    stage.execute("insert into orders values (1, 9.50)").await;
    assert_in_step(&stage, &[PRODUCTS, ORDERS]).await;

    stage.rules(&order());
    let said = stage.keepstep(&["reload"]);
    assert!(said.contains("(1 rule)"), "{said}");
    follows(&daemon, &["order"]).await;
    assert!(daemon.terminate().await.success());
}

#[tokio::test]
async fn a_rules_file_that_cannot_be_followed_changes_nothing_and_is_answered() {
    let stage = Stage::set();
    let daemon = stand(&stage).await;
    let refused = async |wanted: u16, text: &str| {
        let (status, body) = daemon.post("/reload", "").await.unwrap();
        assert_eq!(status, wanted, "{body}");
        assert!(body.contains(text), "{body}");
    };
    stage.rules("[rule.product]\ntable = \"public.products\"\nkey = \"{id}\"\n");
    refused(422, "keepstep.toml:").await;
    stage.rules(&rule("product", "products", "\"id\", \"nmae\""));
    refused(422, "`nmae`").await;
    stage.rules_between("postgresql://postgres@127.0.0.1:1/postgres", &stage.redis.url(), &product());
    refused(502, "Postgres").await;
    stage.rules_between(&stage.postgres.url("postgres"), "redis://127.0.0.1:1", &product());
    refused(502, "Redis").await;
    // As whoever sends a signal finds out.
    stage.rules("nonsense");
    hang_up(&daemon);
    wait_for("all refusals in the log", async || (daemon.log().matches("was not taken").count() == 5).then_some(()))
        .await;

    assert_eq!(daemon.metric("keepstep_sessions_total").await, Some(1.0), "the stream was never interrupted");
    stage.execute("insert into products values (1, 'Pen')").await;
    assert_in_step(&stage, &[PRODUCTS]).await;
}

#[tokio::test]
async fn a_reload_reads_what_is_included_too() {
    let stage = Stage::set();
    let daemon = stand(&stage).await;
    let rules = stage.rules(&product());
    let text = std::fs::read_to_string(&rules).unwrap();
    std::fs::write(&rules, format!("include = [\"rules.d/*.toml\"]\n{text}")).unwrap();
    let included = stage.folder().join("rules.d/order.toml");
    std::fs::create_dir(included.parent().unwrap()).unwrap();
    std::fs::write(&included, order()).unwrap();
    assert_eq!(daemon.post("/reload", "").await.unwrap().0, 200);
    follows(&daemon, &["product", "order"]).await;
    stage.execute("insert into products values (1, 'Pen'); insert into orders values (1, 9.50)").await;
    assert_in_step(&stage, &[PRODUCTS, ORDERS]).await;

    std::fs::write(&included, rule("order", "orders", "\"id\", \"totl\"")).unwrap();
    let (status, body) = daemon.post("/reload", "").await.unwrap();
    assert!(status == 422 && body.contains("rules.d/order.toml:5:") && body.contains("`totl`"), "{body}");
    std::fs::write(&included, rule("order", "orders", "\"id\"")).unwrap();
    assert_eq!(daemon.post("/reload", "").await.unwrap().0, 200);
    assert_in_step(&stage, &[PRODUCTS, Mirror { columns: "id", ..ORDERS }]).await;
}

#[tokio::test]
async fn what_needs_a_restart_is_said_and_the_token_does_not() {
    let stage = Stage::set();
    let daemon = stand(&stage).await;
    let rules = stage.rules(&product());
    let text = std::fs::read_to_string(&rules).unwrap();
    let listen = format!("listen = \"127.0.0.1:{}\"", stage.admin);
    std::fs::write(&rules, text.replace(&listen, "listen = \"off\"\ntoken = \"t0ken\"")).unwrap();
    let (status, body) = daemon.post("/reload", "").await.unwrap();
    assert_eq!(status, 200, "{body}");
    assert!(body.contains("after a restart"), "{body}");
    assert_eq!(daemon.get("/status").await.unwrap().0, 401);
    assert_eq!(daemon.post("/reload", "Authorization: Bearer t0ken\r\n").await.unwrap().0, 200);
}

#[tokio::test]
async fn a_daemon_that_cannot_connect_takes_over_a_file_that_names_another_way() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    stage.rules(&product());
    stage.keepstep(&["setup"]);
    let proxy = Proxy::to(stage.postgres.port).await;
    let through = format!("postgresql://postgres@127.0.0.1:{}/postgres", proxy.port);
    let rules = stage.rules_between(&through, &stage.redis.url(), &product());
    let daemon = Daemon::start(&stage, &rules).await;
    proxy.refuse();
    wait_for("the stream to end", async || (daemon.get("/ready").await?.0 == 503).then_some(())).await;
    stage.execute("insert into products values (1, 'Pen')").await;
    let (status, body) = daemon.post("/warm", "").await.unwrap();
    assert_eq!(status, 503, "a pass has no stream to be merged into: {body}");
    stage.rules(&product());
    assert_eq!(daemon.post("/reload", "").await.unwrap().0, 200);
    assert_in_step(&stage, &[PRODUCTS]).await;
}

#[tokio::test]
async fn messages_are_obeyed_where_they_are_listed_and_once() {
    let stage = Stage::set();
    let mut daemon = stand(&stage).await;
    let say = async |content: &str, end: &str| {
        stage.execute(&format!("begin; select pg_logical_emit_message(true, 'keepstep', '{content}'); {end}")).await;
    };
    say(r#"{"command": "reload"}"#, "commit").await;
    wait_for("the refusal", async || daemon.log().contains("does not list it").then_some(())).await;

    let rules = stage.rules(&(product() + &order()));
    with_postgres(&rules, "message_commands = [\"reload\"]");
    hang_up(&daemon);
    follows(&daemon, &["product", "order"]).await;
    let rules = stage.rules(&order());
    with_postgres(&rules, "message_commands = [\"reload\"]");
    say(r#"{"command": "reload"}"#, "rollback").await;
    say(r#"{"command": "relaod"}"#, "commit").await;
    say(r#"{"command": "warm", "rule": "order"}"#, "commit").await;
    wait_for("both refusals", async || {
        let log = daemon.log();
        (log.contains("is no command") && log.matches("does not list it").count() == 2).then_some(())
    })
    .await;
    follows(&daemon, &["product", "order"]).await;

    let sessions = daemon.metric("keepstep_sessions_total").await.unwrap();
    say(r#"{"command": "reload"}"#, "commit").await;
    follows(&daemon, &["order"]).await;
    daemon.ready().await;
    // Whatever was sent again has been heard by the time that a later change is in the cache.
    stage.execute("insert into orders values (1, 9.50)").await;
    assert_in_step(&stage, &[ORDERS]).await;
    assert_eq!(daemon.metric("keepstep_sessions_total").await, Some(sessions + 1.0));
}

#[tokio::test]
async fn commands_that_make_no_sense_or_come_from_a_web_page_are_refused() {
    let stage = Stage::set();
    let daemon = stand(&stage).await;
    let answer = async |target: &str, headers: &str| daemon.post(target, headers).await.unwrap();
    let (status, body) = answer("/warm?rule=prodcut", "").await;
    assert_eq!(status, 400);
    assert!(body.contains("did you mean `product`?"), "{body}");
    for target in ["/warm?sample=1%25", "/verify?sample=200%25", "/verify?where=true", "/warm?where=a&where=b"] {
        assert_eq!(answer(target, "").await.0, 400, "{target}");
    }
    assert_eq!(answer("/reload", "Origin: https://shop.example\r\n").await.0, 403);
    assert_eq!(daemon.get("/reload").await.unwrap().0, 405);
    wait_for("nothing to be owed", async || (daemon.get("/ready?warm=1").await?.0 == 200).then_some(())).await;

    let mut keepstep = Command::new(env!("CARGO_BIN_EXE_keepstep"));
    let output = keepstep.args(["warm", "--rule", "prodcut"]).current_dir(stage.folder()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("there is no rule `prodcut`") && said.contains("hint: did you mean `product`?"), "{said}");
    let mut keepstep = Command::new(env!("CARGO_BIN_EXE_keepstep"));
    let output = keepstep.args(["verify", "--sample", "0%"]).current_dir(stage.folder()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[tokio::test]
async fn a_pass_that_nobody_listens_to_any_more_ends_with_the_table_under_way() {
    let stage = Stage::set();
    stage.execute(TABLES).await;
    for table in ["products", "orders"] {
        stage.execute(&format!("insert into {table} (id) select generate_series(1, 30000)")).await;
    }
    let rules = stage.rules(&(product() + "warm = false\n" + &order() + "warm = false\n"));
    stage.set_fields("[postgres]", "warm_rate = \"10000/s\"");
    stage.keepstep(&["setup"]);
    let daemon = Daemon::start(&stage, &rules).await;
    let logged = |text: &str| daemon.log().matches(text).count();
    let asked = stage.begin(&["verify"]);
    wait_for("the first table", async || (logged("verify begins") == 1).then_some(())).await;
    asked.abort();
    wait_for("its end", async || (logged("verify done") == 1).then_some(())).await;
    // What is asked next comes behind it.
    stage.keepstep(&["verify", "--rule", "order", "--sample", "1%"]);
    assert_eq!(logged("verify begins"), 2, "the table under way, and the one asked for then");
}
