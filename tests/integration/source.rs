//! Connections to Postgres and the stream of a slot, against a real server.

use std::fs;
use std::path::Path;
use std::time::Duration;

use keepstep::error::{Error, ErrorKind, Result};
use keepstep::model::Lsn;
use keepstep::sandbox::Postgres;
use keepstep::source::conninfo::ConnInfo;
use keepstep::source::replication::{Frame, Replication, Walsender};
use keepstep::source::{client, slot};

use crate::support::wait_for;

/// A server whose pg_hba.conf begins with these lines; everybody else is trusted. `sql` runs first.
pub(crate) async fn server(settings: &str, sql: &str, hba: &str) -> Postgres {
    let mut postgres = Postgres::start_copy(Path::new(env!("CARGO_TARGET_TMPDIR")), settings).unwrap();
    execute(&postgres, sql).await;
    postgres.stop("INT").unwrap();
    let trust = "local all all trust\nhost all all 127.0.0.1/32 trust\n";
    fs::write(postgres.data().join("pg_hba.conf"), format!("{hba}\n{trust}")).unwrap();
    postgres.resume().unwrap();
    postgres
}

/// Runs statements, each in its own transaction: a slot cannot be made in one that has written.
pub(crate) async fn execute(postgres: &Postgres, sql: &str) {
    let (client, connection) = tokio_postgres::connect(&postgres.url("postgres"), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for statement in sql.split(';') {
        client.batch_execute(statement).await.unwrap();
    }
}

/// From a URL, with no environment.
pub(crate) fn info(url: &str) -> ConnInfo {
    ConnInfo::parse(url, &|_| None).unwrap()
}

/// `postgresql://USER@127.0.0.1:PORT/postgres?PARAMETERS`
pub(crate) fn url(postgres: &Postgres, user: &str, parameters: &str) -> String {
    format!("postgresql://{user}@127.0.0.1:{}/postgres?{parameters}", postgres.port)
}

/// Connects in both ways, which must come to the same end, and asks who and how it is.
pub(crate) async fn connect(url: &str) -> Result<String> {
    let info = info(url);
    let replication = Walsender::connect(&info).await;
    let query = client::connect(&info, Duration::from_secs(10)).await;
    match (replication, query) {
        (Ok(mut walsender), Ok(client)) => {
            assert_eq!(walsender.identify_system().await?.database, info.database);
            let sql = "select current_user::text, coalesce((select version from pg_stat_ssl
                       where pid = pg_backend_pid() and ssl), 'plain')";
            let row = client.query_one(sql, &[]).await.unwrap();
            Ok(format!("{} {}", row.get::<_, String>(0), row.get::<_, String>(1)))
        }
        (Err(replication), Err(query)) => {
            assert_eq!(replication.kind(), query.kind(), "{replication} / {query}");
            Err(replication)
        }
        (replication, query) => panic!("{replication:?} / {query:?}"),
    }
}

pub(crate) async fn refused(url: &str) -> Error {
    connect(url).await.expect_err(url)
}

/// The bodies of frames until one of them contains `wanted`.
pub(crate) async fn stream_until(replication: &mut Replication, wanted: &[u8]) -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    let found = async {
        loop {
            while let Some(frame) = replication.next_buffered()? {
                if let Frame::Data { body, .. } = frame {
                    bodies.push(body.to_vec());
                    if body.windows(wanted.len()).any(|window| window == wanted) {
                        return Ok::<_, Error>(());
                    }
                }
            }
            replication.fill().await?;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.expect("the change arrives").unwrap();
    bodies
}

async fn flush_lsn(client: &tokio_postgres::Client) -> Lsn {
    let row = client.query_one("select pg_current_wal_flush_lsn()::text", &[]).await.unwrap();
    row.get::<_, &str>(0).parse().unwrap()
}

const SLOT: &str = "create table t (id int primary key, v text);
     create publication p for table t;
     select pg_create_logical_replication_slot('s', 'pgoutput')";

#[tokio::test]
async fn every_way_of_authentication() {
    let roles = "create role trusted login replication;
         create role clear login replication password 'sécret';
         set password_encryption = 'md5'; create role hashed login replication password 'sécret';
         set password_encryption = 'scram-sha-256'; create role scram login replication password 'sécret'";
    let hba = "host all clear 127.0.0.1/32 password\nhost all hashed 127.0.0.1/32 md5\n\
               host all scram 127.0.0.1/32 scram-sha-256\nhost all outsider 127.0.0.1/32 reject";
    let postgres = server("", roles, hba).await;
    assert_eq!(connect(&url(&postgres, "trusted", "")).await.unwrap(), "trusted plain");
    for user in ["clear", "hashed", "scram"] {
        let right = connect(&url(&postgres, &format!("{user}:s%C3%A9cret"), "")).await;
        assert_eq!(right.unwrap(), format!("{user} plain"));
        let wrong = refused(&url(&postgres, &format!("{user}:wrong-one"), "")).await;
        assert_eq!(wrong.kind(), ErrorKind::PostgresDenied);
        let text = format!("{wrong} {:?}", wrong.hints());
        assert!(text.contains("28P01") && !text.contains("wrong-one"), "{text}");
    }
    let without = Walsender::connect(&info(&url(&postgres, "scram", ""))).await.unwrap_err();
    assert!(without.to_string().contains("asks for a password"), "{without}");
    let outsider = refused(&url(&postgres, "outsider", "")).await;
    assert!(outsider.hints()[0].contains("pg_hba.conf"), "{outsider:?}");
    let elsewhere = url(&postgres, "trusted", "").replace("/postgres?", "/nowhere?");
    assert!(refused(&elsewhere).await.to_string().contains("3D000"));
}

#[tokio::test]
async fn passwords_come_from_the_password_file_too() {
    let roles = "create role scram login replication password 'a:b\\c'";
    let postgres = server("", roles, "host all scram 127.0.0.1/32 scram-sha-256").await;
    let file = postgres.folder().join("passwords");
    fs::write(&file, format!("# comment\n127.0.0.1:{}:*:scram:a\\:b\\\\c\n", postgres.port)).unwrap();
    let url = url(&postgres, "scram", &format!("passfile={}", file.display()));
    let mode = |mode| fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
    mode(0o644);
    assert!(connect_replication(&url).await.unwrap_err().to_string().contains("asks for a password"));
    mode(0o600);
    assert_eq!(connect(&url).await.unwrap(), "scram plain");
}

async fn connect_replication(url: &str) -> Result<Walsender> {
    Walsender::connect(&info(url)).await
}

#[tokio::test]
async fn over_a_unix_socket() {
    let postgres = server("", "", "").await;
    let folder = postgres.folder().display();
    let port = postgres.port;
    let encoded = postgres.folder().display().to_string().replace('/', "%2F");
    for url in [
        format!("postgresql:///postgres?host={folder}&port={port}&user=postgres"),
        format!("postgresql+asyncpg://postgres@{encoded}:{port}/postgres?sslmode=require"),
    ] {
        assert_eq!(connect(&url).await.unwrap(), "postgres plain", "{url}");
    }
}

#[tokio::test]
async fn the_next_host_takes_over() {
    let primary = server("", "", "").await;
    let read_only = server("default_transaction_read_only = on", "", "").await;
    let dead = keepstep::sandbox::free_port().unwrap();
    let hosts = format!("127.0.0.1:{dead},127.0.0.1:{},127.0.0.1:{}", read_only.port, primary.port);
    let url = |target: &str| format!("postgresql://postgres@{hosts}/postgres?target_session_attrs={target}");
    for (target, expected) in [("any", "on"), ("read-write", "off"), ("read-only", "on"), ("prefer-standby", "on")] {
        let client = client::connect(&info(&url(target)), Duration::ZERO).await.unwrap();
        let row = client.query_one("show default_transaction_read_only", &[]).await.unwrap();
        assert_eq!(row.get::<_, String>(0), expected, "{target}");
    }
    let none = refused(&url("standby")).await;
    assert_eq!(none.kind(), ErrorKind::PostgresAway);
    assert!(none.to_string().contains("target_session_attrs"), "{none}");
}

#[tokio::test]
async fn sessions_write_values_the_same_way_whatever_the_defaults() {
    let settings = "timezone = 'America/New_York'\ndatestyle = 'German'\nintervalstyle = 'iso_8601'\n\
                    extra_float_digits = -5\nbytea_output = 'escape'";
    let sql = "create table v (a timestamptz, b interval, c float8, d bytea);
         create publication p for table v; alter table v replica identity full;
         select pg_create_logical_replication_slot('s', 'pgoutput')";
    let postgres = server(settings, sql, "").await;
    let info = info(&url(&postgres, "postgres", "options=-c%20datestyle=SQL"));
    let client = client::connect(&info, Duration::ZERO).await.unwrap();
    let sql = "insert into v values ('2024-02-29 12:00+00', '1 day', 1.0/3, '\\x00ff') returning v::text";
    let row = client.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), r#"("2024-02-29 12:00:00+00","1 day",0.3333333333333333,"\\x00ff")"#);
    let walsender = Walsender::connect(&info).await.unwrap();
    let mut replication = walsender.start("s", "p", Lsn(0)).await.unwrap();
    let bodies = stream_until(&mut replication, b"0.3333333333333333").await;
    let insert = String::from_utf8_lossy(bodies.last().unwrap()).into_owned();
    for text in ["2024-02-29 12:00:00+00", "1 day", "\\x00ff"] {
        assert!(insert.contains(text), "{insert}");
    }
}

#[tokio::test]
async fn an_insert_arrives_and_is_acknowledged() {
    let postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    let client = client::connect(&info, Duration::ZERO).await.unwrap();
    let identity = Walsender::connect(&info).await.unwrap().identify_system().await.unwrap();
    assert!(identity.flush_lsn <= flush_lsn(&client).await && identity.timeline == 1 && identity.system.len() > 10);

    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "p", Lsn(0)).await.unwrap();
    client.batch_execute("insert into t values (1, 'first')").await.unwrap();
    let bodies = stream_until(&mut replication, b"first").await;
    let tags: Vec<u8> = bodies.iter().map(|body| body[0]).collect();
    assert_eq!(tags, *b"BRI");

    let before = slot::slot_state(&client, "s").await.unwrap().unwrap();
    assert!(before.active_pid.is_some() && !before.is_lost() && before.retained_bytes.unwrap() > 0);
    assert_eq!((before.plugin.as_deref(), before.database.as_deref()), (Some("pgoutput"), Some("postgres")));
    slot::heartbeat(&client).await.unwrap();
    let flushed = flush_lsn(&client).await;
    replication.close(flushed).await.unwrap();
    let after = slot::slot_state(&client, "s").await.unwrap().unwrap();
    assert_eq!((after.confirmed_flush_lsn, after.active_pid), (Some(flushed), None));
    assert_eq!(slot::slot_state(&client, "other").await.unwrap(), None);
}

#[tokio::test]
async fn messages_arrive_in_the_stream() {
    let postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    let client = client::connect(&info, Duration::ZERO).await.unwrap();
    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "p", Lsn(0)).await.unwrap();
    slot::heartbeat(&client).await.unwrap();
    let bodies = stream_until(&mut replication, b"keepstep\0").await;
    assert_eq!(bodies.last().unwrap()[0], b'M');
}

#[tokio::test]
async fn a_huge_row_passes_and_the_next_one_too() {
    let postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    execute(&postgres, "insert into t select 1, repeat('x', 40000000) || 'end'; insert into t values (2, 'after')")
        .await;
    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "p", Lsn(0)).await.unwrap();
    let bodies = stream_until(&mut replication, b"after").await;
    let huge = bodies.iter().find(|body| body.ends_with(b"end")).unwrap();
    assert!(huge.len() > 40_000_000);
}

#[tokio::test]
async fn a_busy_slot_is_taken_over_once_it_is_free() {
    let postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    let start = async || Walsender::connect(&info).await?.start("s", "p", Lsn(0)).await;
    let first = start().await.unwrap();
    let busy = start().await.unwrap_err();
    assert_eq!(busy.kind(), ErrorKind::PostgresAway);
    assert!(busy.to_string().contains("55006"), "{busy}");
    drop(first);
    wait_for("the slot to be free", async || start().await.ok()).await;
}

#[tokio::test]
async fn what_a_slot_cannot_do_is_told_apart() {
    let postgres = server("max_slot_wal_keep_size = 1MB", SLOT, "").await;
    execute(&postgres, "select pg_create_physical_replication_slot('physical')").await;
    execute(&postgres, "create database elsewhere").await;
    let info = info(&url(&postgres, "postgres", ""));
    let refusal = async |info: &ConnInfo, slot: &str| {
        Walsender::connect(info).await.unwrap().start(slot, "p", Lsn(0)).await.unwrap_err()
    };
    let missing = refusal(&info, "missing").await;
    assert_eq!(missing.kind(), ErrorKind::Gap, "{missing}");
    assert_eq!(refusal(&info, "physical").await.kind(), ErrorKind::Identity);
    let client = client::connect(&info, Duration::ZERO).await.unwrap();
    // Not every server has that plugin, or lets it be used.
    if client.batch_execute("select pg_create_logical_replication_slot('foreign', 'test_decoding')").await.is_ok() {
        let foreign = refusal(&info, "foreign").await;
        assert_eq!(foreign.kind(), ErrorKind::Identity);
        assert!(foreign.to_string().contains("test_decoding"), "{foreign}");
    }
    let elsewhere = ConnInfo { database: "elsewhere".to_owned(), ..info.clone() };
    let error = refusal(&elsewhere, "s").await;
    assert_eq!(error.kind(), ErrorKind::Identity);
    assert!(error.to_string().contains("`postgres`") && error.to_string().contains("`elsewhere`"), "{error}");

    // Three segments of log and a checkpoint leave the idle slots behind.
    for _ in 0..3 {
        execute(&postgres, "select pg_logical_emit_message(false, '', 'x'); select pg_switch_wal()").await;
    }
    execute(&postgres, "checkpoint").await;
    let lost = refusal(&info, "s").await;
    assert_eq!(lost.kind(), ErrorKind::Gap, "{lost}");
    assert!(slot::slot_state(&client, "s").await.unwrap().unwrap().is_lost());
}

#[tokio::test]
async fn a_missing_publication_ends_the_stream_with_its_name() {
    let postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "nowhere", Lsn(0)).await.unwrap();
    execute(&postgres, "insert into t values (1, 'x')").await;
    let ended = async {
        loop {
            match replication.next_buffered() {
                Ok(None) => replication.fill().await.unwrap(),
                Ok(Some(_)) => {}
                Err(error) => return error,
            }
        }
    };
    // Postgres 18 only warns, and sends nothing.
    if postgres.install.major < 18 {
        let error = tokio::time::timeout(Duration::from_secs(30), ended).await.unwrap();
        assert_eq!(error.kind(), ErrorKind::PostgresDenied);
        assert!(error.to_string().contains("nowhere"), "{error}");
    }
}

#[tokio::test]
async fn a_restart_is_the_server_being_away_and_needs_no_acknowledgement() {
    let mut postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "p", Lsn(0)).await.unwrap();
    execute(&postgres, "insert into t values (1, 'kept')").await;
    stream_until(&mut replication, b"kept").await;
    // The daemon answers keepalives, but has not applied the insert: a fast shutdown must come to its end all the same.
    let streaming = tokio::spawn(async move {
        loop {
            match replication.next_buffered() {
                Ok(Some(Frame::Keepalive { reply_requested: true, .. })) => {
                    if let Err(error) = replication.send_status(Lsn(1), false).await {
                        return error;
                    }
                }
                Ok(Some(_)) => {}
                Ok(None) => {
                    if let Err(error) = replication.fill().await {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
    });
    let postgres = tokio::task::spawn_blocking(move || {
        postgres.stop("INT").unwrap();
        postgres
    });
    let mut postgres = tokio::time::timeout(Duration::from_secs(30), postgres).await.expect("it stops").unwrap();
    assert_eq!(streaming.await.unwrap().kind(), ErrorKind::PostgresAway);
    assert_eq!(Walsender::connect(&info).await.unwrap_err().kind(), ErrorKind::PostgresAway);
    postgres.resume().unwrap();
    let mut replication = Walsender::connect(&info).await.unwrap().start("s", "p", Lsn(0)).await.unwrap();
    stream_until(&mut replication, b"kept").await;
}

#[tokio::test]
async fn a_temporary_slot_leaves_nothing_behind() {
    let postgres = server("", SLOT, "").await;
    let info = info(&url(&postgres, "postgres", ""));
    let client = client::connect(&info, Duration::ZERO).await.unwrap();
    let before = slot::slot_state(&client, "s").await.unwrap().unwrap().confirmed_flush_lsn;
    let mut replication = Walsender::connect(&info).await.unwrap().start_temporary("p").await.unwrap();
    client.batch_execute("insert into t values (1, 'seen')").await.unwrap();
    stream_until(&mut replication, b"seen").await;
    let flushed = flush_lsn(&client).await;
    replication.close(flushed).await.unwrap();
    let count = client.query_one("select count(*) from pg_replication_slots", &[]).await.unwrap();
    assert_eq!(count.get::<_, i64>(0), 1);
    assert_eq!(slot::slot_state(&client, "s").await.unwrap().unwrap().confirmed_flush_lsn, before);
}

#[tokio::test]
async fn something_else_behind_the_port_is_told_apart() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
            // Whatever it sends is read, so that the answer is not lost in a reset.
            tokio::spawn(async move { tokio::io::copy(&mut socket, &mut tokio::io::sink()).await });
        }
    });
    for mode in ["require", "disable"] {
        let url = format!("postgresql://u@127.0.0.1:{port}/d?sslmode={mode}");
        let error = connect_replication(&url).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol, "{error}");
    }
}
