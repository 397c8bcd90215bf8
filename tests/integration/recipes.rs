//! The recipes of `deploy/rules`: each is run as it stands there, on the tables beside it, and the keys are as its
//! comments say.

use std::fs;
use std::path::Path;
use std::time::Duration;

use redis::Value;

use crate::support::{Daemon, Stage, reads_outbox, wait_for};

/// Servers with a recipe's tables and these rows in them, and the daemon at work.
async fn cook(recipe: &str, rows: &str) -> (Stage, Daemon) {
    let stage = Stage::set();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/rules");
    let read = |extension: &str| fs::read_to_string(folder.join(recipe).with_extension(extension)).unwrap();
    stage.execute(&read("sql")).await;
    stage.execute(rows).await;
    let rules = read("toml")
        .replace("${DATABASE_URL}", &stage.postgres.url("postgres"))
        .replace("${REDIS_URL}", &stage.redis.url())
        + &format!("\n[admin]\nlisten = \"127.0.0.1:{}\"\n", stage.admin);
    let rules = if reads_outbox() { rules.replace("[postgres]", "[postgres]\nsource = \"outbox\"") } else { rules };
    let path = stage.folder().join("keepstep.toml");
    fs::write(&path, rules).unwrap();
    stage.keepstep(&["setup"]);
    let said = stage.run(&["check", "--connect"]);
    let said = (said.status.success(), String::from_utf8(said.stderr).unwrap());
    assert!(said.0 && !said.1.contains("warning"), "{}", said.1);
    let daemon = Daemon::start(&stage, &path).await;
    wait_for("every row's key", async || (daemon.get("/ready?caught_up=1&warm=1").await?.0 == 200).then_some(())).await;
    (stage, daemon)
}

/// What a command answers, as `redis-cli` shows it but on one line.
async fn answer(stage: &Stage, command: &str) -> String {
    let mut words = command.split(' ');
    let mut asked = redis::cmd(words.next().unwrap());
    words.for_each(|word| {
        asked.arg(word);
    });
    shown(&asked.query_async(&mut stage.cache().await).await.unwrap())
}

fn shown(value: &Value) -> String {
    match value {
        Value::Nil => "nil".to_owned(),
        Value::Okay => "OK".to_owned(),
        Value::Int(number) => number.to_string(),
        Value::BulkString(text) => String::from_utf8(text.clone()).unwrap(),
        Value::Array(items) => items.iter().map(shown).collect::<Vec<_>>().join(" "),
        other => format!("{other:?}"),
    }
}

/// Waits until a command answers so.
async fn gives(stage: &Stage, command: &str, expected: &str) {
    let what = format!("`{command}` to give {expected}");
    wait_for(&what, async || (answer(stage, command).await == expected).then_some(())).await;
}

/// Puts keys there, as the application fills its cache.
async fn fill(stage: &Stage, keys: &[&str]) {
    for key in keys {
        assert_eq!(answer(stage, &format!("SET {key} filled")).await, "OK");
    }
}

/// What an expression is in Postgres.
async fn sql(stage: &Stage, expression: &str) -> String {
    stage.sql().await.query_one(&format!("select {expression}"), &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn lists() {
    let rows = "insert into faculty values (7, 123, 9, 'Ada', null), (8, 124, 9, 'Bob', 'Dean')";
    let (stage, _daemon) = cook("lists", rows).await;
    let detail = "GET app:v1:detail:faculty:org_123:7";
    gives(&stage, detail, r#"{"id":7,"name":"Ada","title":null,"department_id":9}"#).await;
    let pages = ["app:v1:list:faculty:org_123:page_1", "app:v1:list:faculty:org_123:dept_9:page_1"];
    let others = ["app:v1:list:faculty:org_124:page_1", "app:v1:list:faculty:org_1234:page_1"];
    fill(&stage, &pages).await;
    fill(&stage, &others).await;
    stage.execute("update faculty set name = 'Ada L.' where id = 7").await;
    gives(&stage, detail, r#"{"id":7,"name":"Ada L.","title":null,"department_id":9}"#).await;
    gives(&stage, &format!("EXISTS {}", pages.join(" ")), "0").await;
    assert_eq!(answer(&stage, &format!("EXISTS {}", others.join(" "))).await, "2");

    stage.execute("update faculty set org_id = 124 where id = 7").await;
    gives(&stage, &format!("EXISTS {}", others.join(" ")), "1").await;
    gives(&stage, "EXISTS app:v1:detail:faculty:org_123:7 app:v1:detail:faculty:org_124:7", "1").await;
}

#[tokio::test]
async fn schemas() {
    let (stage, _daemon) = cook("schemas", "insert into tenant_acme.documents values (7, 9, 'Plan')").await;
    let document = "GET tenant_acme:document:7";
    gives(&stage, document, r#"{"id":7,"folder_id":9,"title":"Plan"}"#).await;
    fill(&stage, &["tenant_acme:folder:9", "tenant_acme:folder:10", "tenant_umbrella:folder:9"]).await;
    stage.execute("update tenant_acme.documents set folder_id = 10").await;
    gives(&stage, document, r#"{"id":7,"folder_id":10,"title":"Plan"}"#).await;
    gives(&stage, "EXISTS tenant_acme:folder:9 tenant_acme:folder:10", "0").await;
    gives(&stage, "EXISTS tenant_acme:pages", "1").await;
    assert_eq!(answer(&stage, "EXISTS tenant_umbrella:folder:9 tenant_umbrella:pages").await, "1");

    let added =
        "create schema tenant_new; create table tenant_new.documents (like tenant_acme.documents including all);
                 alter table tenant_new.documents replica identity full;
                 insert into tenant_new.documents values (1, 1, 'First')";
    stage.execute(added).await;
    stage.keepstep(&["setup"]);
    gives(&stage, "GET tenant_new:document:1", r#"{"id":1,"folder_id":1,"title":"First"}"#).await;
    stage.execute("drop schema tenant_acme cascade").await;
    gives(&stage, "EXISTS tenant_acme:document:7", "0").await;
}

#[tokio::test]
async fn django() {
    let (stage, _daemon) =
        cook("django", "insert into shop_product values (7, 'Pen', 1.50, 3), (8, 'Ink', 5, 3)").await;
    gives(&stage, "GET :1:product:7", r#"{"id":7,"name":"Pen","price":"1.50","category_id":3}"#).await;
    let page = async |id: i32| {
        let url = sql(&stage, &format!("md5('https://shop.example/products/{id}/')")).await;
        format!(":1:views.decorators.cache.cache_page..GET.{url}.d41d8cd98f00b204e9800998ecf8427e.en-us.UTC")
    };
    let fragment = format!(":1:template.cache.product.{}", sql(&stage, "md5('7:')").await);
    let other = page(8).await;
    fill(&stage, &[":1:products:list:page=1", &fragment, &page(7).await, &other, ":1:products:other"]).await;
    stage.execute("update shop_product set price = 2 where id = 7").await;
    gives(&stage, "GET :1:product:7", r#"{"id":7,"name":"Pen","price":"2.00","category_id":3}"#).await;
    gives(&stage, &format!("EXISTS :1:products:list:page=1 {fragment} {}", page(7).await), "0").await;
    assert_eq!(answer(&stage, &format!("EXISTS {other} :1:products:other")).await, "2");
}

#[tokio::test]
async fn rails() {
    let rows = "insert into products (id, name, price, updated_at)
                values (7, 'Pen', 1.5, '2024-01-01 12:00:00.5'), (77, 'Ink', 5, default)";
    let (stage, _daemon) = cook("rails", rows).await;
    let api = r#"{"id":7,"name":"Pen","price":1.50,"updated_at":"2024-01-01T12:00:00.5"}"#;
    gives(&stage, "GET shop:api/products/7", api).await;
    let stale = ["shop:products/7", "shop:products/7/related", "shop:views/products/_product:3f2a/products/7"];
    let others = ["shop:products/77/related", "shop:views/products/_product:3f2a/products/77"];
    fill(&stage, &stale).await;
    fill(&stage, &others).await;
    stage.execute("update products set price = 2 where id = 7").await;
    gives(&stage, "GET shop:api/products/7", &api.replace("1.50", "2.00")).await;
    gives(&stage, &format!("EXISTS {}", stale.join(" ")), "0").await;
    assert_eq!(answer(&stage, &format!("EXISTS {}", others.join(" "))).await, "2");
}

#[tokio::test]
async fn feed() {
    let rows = "insert into posts select i, i % 2, 'p' || i, false, timestamptz '2024-01-01 00:00Z' + i * interval '1s'
                  from generate_series(1, 5) i;
                insert into posts values (6, 1, 'a draft', false, null)";
    let (stage, _daemon) = cook("feed", rows).await;
    gives(&stage, "ZRANGE feed:global 0 2 REV", "5 4 3").await;
    gives(&stage, "ZRANGE feed:global (1704067203 -inf BYSCORE REV LIMIT 0 20", "2 1").await;
    gives(&stage, "ZRANGE feed:author:1 0 19 REV", "5 3 1").await;
    stage.execute("update posts set hidden = true where id = 5; update posts set author_id = 1 where id = 4").await;
    gives(&stage, "ZRANGE feed:author:1 0 19 REV", "4 3 1").await;
    gives(&stage, "ZRANGE feed:global 0 19 REV", "4 3 2 1").await;
    gives(&stage, "ZRANGE feed:author:0 0 19 REV", "2").await;
    let fourth = r#"{"id":4,"author_id":1,"title":"p4","published_at":"2024-01-01T00:00:04+00:00"}"#;
    gives(&stage, "MGET feed:post:5 feed:post:4", &format!("nil {fourth}")).await;
    stage.execute("update posts set published_at = '2024-06-01Z' where id = 6").await;
    gives(&stage, "ZRANGE feed:global 0 0 REV", "6").await;
}

#[tokio::test]
async fn pages() {
    let (stage, _daemon) = cook("pages", "insert into products values (1, 3, 'Pen', 1), (2, 4, 'Ink', 1)").await;
    let generation = async |key: &str| answer(&stage, &format!("GET shop:gen:{key}")).await;
    let mut before = Vec::new();
    for change in ["update products set price = 2 where category_id = 3", "update products set price = price + 1"] {
        let (third, all) = (generation("category:3").await, generation("products").await);
        stage.execute(change).await;
        wait_for("new generations", async || {
            (generation("category:3").await != third && generation("products").await != all).then_some(())
        })
        .await;
        before.push(generation("category:4").await);
    }
    assert!(before[0] != before[1], "the second change is of both categories, the first of one");
    let (third, fourth) = (generation("category:3").await, generation("category:4").await);
    stage.execute("update products set category_id = 4 where id = 1").await;
    wait_for("those of both categories", async || {
        (generation("category:3").await != third && generation("category:4").await != fourth).then_some(())
    })
    .await;
}

#[tokio::test]
async fn sessions() {
    let rows =
        "insert into sessions values ('secret', 7, '{admin,staff}', now() + '1h'), ('other', 7, '{}', now() + '1h')";
    let (stage, _daemon) = cook("sessions", rows).await;
    let key = format!("auth:session:{}", sql(&stage, "encode(sha256('secret'), 'hex')").await);
    gives(&stage, &format!("HGETALL {key}"), "user_id 7 roles {admin,staff}").await;
    let ttl: u64 = answer(&stage, &format!("TTL {key}")).await.parse().unwrap();
    assert!((1..=3600).contains(&ttl), "{ttl}");

    let client = redis::Client::open(stage.redis.url()).unwrap();
    let mut listener = client.get_connection().unwrap();
    let mut subscribed = listener.as_pubsub();
    subscribed.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    subscribed.subscribe("auth:revoked:7").unwrap();
    stage.execute("update sessions set revoked_at = now() where token = 'secret'").await;
    gives(&stage, &format!("EXISTS {key}"), "0").await;
    let message: String = subscribed.get_message().unwrap().get_payload().unwrap();
    assert!(message.starts_with(r#"{"op":"update","table":"public.sessions""#), "{message}");
    stage.execute("delete from sessions where token = 'other'").await;
    let message: String = subscribed.get_message().unwrap().get_payload().unwrap();
    assert!(message.starts_with(r#"{"op":"delete""#), "{message}");
    gives(&stage, "KEYS auth:session:*", "").await;
}

#[tokio::test]
async fn leaderboard() {
    let rows = "insert into players values (17, 'Ada', 'NZ'), (18, 'Bob', null);
                insert into scores values (3, 17, 10), (3, 18, 20), (3, 19, 0), (4, 17, 5)";
    let (stage, _daemon) = cook("leaderboard", rows).await;
    gives(&stage, "ZRANGE game:board:3 0 9 REV WITHSCORES", "18 20 17 10").await;
    gives(&stage, "HGETALL game:player:18", "name Bob").await;
    stage.execute("update scores set points = 30 where player_id = 17 and season = 3").await;
    gives(&stage, "ZREVRANK game:board:3 17", "0").await;
    stage.execute("delete from scores where season = 4").await;
    gives(&stage, "EXISTS game:board:4", "0").await;
    gives(&stage, "HGET game:player:17 name", "Ada").await;
}

#[tokio::test]
async fn queries() {
    let rows = "insert into categories values (3, 'Office'), (4, 'Garden'); insert into sellers values (1, 'Ada'), (2, 'Bob');
                insert into products values (7, 3, 1, 'Pen', 1.5, 2, true), (8, 3, 2, 'Ink', 0.9, 1, true), (9, 3, 2, 'Old', 0.1, 0, false)";
    let (stage, _daemon) = cook("queries", rows).await;
    let (page, total) = ("GET shop:page:category:3", "GET shop:total:3");
    let (ink, pen) = (r#"{"id":8,"name":"Ink","seller":"Bob"}"#, r#"{"id":7,"name":"Pen","seller":"Ada"}"#);
    gives(&stage, page, &format!("[{ink},{pen}]")).await;
    gives(&stage, total, r#"{"products":2,"cheapest":0.90}"#).await;
    gives(&stage, "GET shop:page:category:4", "[]").await;
    stage.execute("update sellers set name = 'Eve' where id = 2").await;
    let ink = ink.replace("Bob", "Eve");
    gives(&stage, page, &format!("[{ink},{pen}]")).await;
    stage.execute("update products set category_id = 4 where id = 8").await;
    gives(&stage, page, &format!("[{pen}]")).await;
    gives(&stage, "GET shop:page:category:4", &format!("[{ink}]")).await;
    gives(&stage, total, r#"{"products":1,"cheapest":1.50}"#).await;
    stage.execute("delete from products where id = 8; delete from categories where id = 4").await;
    gives(&stage, "EXISTS shop:page:category:4 shop:total:4", "0").await;
    stage.execute("insert into categories values (5, 'Toys')").await;
    gives(&stage, "GET shop:total:5", r#"{"products":0,"cheapest":null}"#).await;
}

#[tokio::test]
async fn counts() {
    let rows = "insert into tickets select i, 3, 'open', i from generate_series(1, 10) i";
    let (stage, _daemon) = cook("counts", rows).await;
    gives(&stage, "SCARD desk:open:3", "10").await;
    gives(&stage, "SMEMBERS desk:urgent", "8 9 10").await;
    stage.execute("update tickets set status = 'done' where id = 9; update tickets set team_id = 4 where id < 3").await;
    gives(&stage, "SCARD desk:open:3", "7").await;
    gives(&stage, "SCARD desk:open:4", "2").await;
    gives(&stage, "SMEMBERS desk:urgent", "8 10").await;
}

#[tokio::test]
async fn cdn() {
    let (stage, _daemon) = cook("cdn", "insert into articles values (7, 'old', 'News')").await;
    let last = "XREVRANGE cdn:purge + - COUNT 1";
    let told = async |op: &str| {
        wait_for(op, async || Some(answer(&stage, last).await).filter(|entry| entry.contains(&format!("op {op} "))))
            .await
    };
    stage.execute("update articles set slug = 'new' where id = 7").await;
    let entry = told("update").await;
    let expected = r#" before {"id":7,"slug":"old","title":"News"} after {"id":7,"slug":"new","title":"News"} "#;
    assert!(entry.contains(expected), "{entry}");
    stage.execute("truncate articles").await;
    told("truncate").await;
}

#[tokio::test]
async fn mirror() {
    let rows = "insert into invoice values (7, 'Ada', 12.50), (8, 'Bob', null);
                insert into invoice_line values (7, 1, 'Pen', 2), (7, 2, 'Ink', 1)";
    let (stage, _daemon) = cook("mirror", rows).await;
    gives(&stage, "HGETALL invoice:id:7", "id 7 customer Ada total 12.50").await;
    gives(&stage, "HGETALL invoice:id:8", "id 8 customer Bob").await;
    stage.execute("update invoice set total = null where id = 7; update invoice_line set qty = 5 where line = 1").await;
    gives(&stage, "HGETALL invoice:id:7", "id 7 customer Ada").await;
    gives(&stage, "HGET invoice_line:invoice_id:7:line:1 qty", "5").await;
    stage.execute("delete from invoice_line where line = 2").await;
    gives(&stage, "EXISTS invoice_line:invoice_id:7:line:2", "0").await;
}
