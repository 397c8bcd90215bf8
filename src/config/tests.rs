//! The messages, one small case for each mistake, and what holds for every text.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use proptest::prelude::*;

use super::diagnostic::render;
use super::fields::{FIELDS, Fallback, Table};
use super::*;

/// Both servers, so that a case can be about something else.
const SERVERS: &str = "[postgres]\nurl = \"postgresql://db/shop\"\n[redis]\nurl = \"redis://cache\"\n";
/// A rule, so that a case can be about the servers.
const RULE: &str = "[rule.feed]\ntable = \"public.products\"\ndelete = [\"feed:global\"]\n";
/// The lines of a rule that writes keys.
const KEY: &str =
    "table = \"public.products\"\nkey = \"product:{id}\"\nvalue = \"json\"\ncolumns = [\"id\", \"name\"]\n";

/// `[redis]` with these prefixes, for the tests of other modules.
pub(crate) fn redis_config(prefix: &str, also: &[&str]) -> RedisConfig {
    let redis = format!("[redis]\nurl = \"redis://cache\"\nprefix = \"{prefix}\"\n");
    let config = read(&format!("[postgres]\nurl = \"postgresql://db\"\n{redis}{RULE}"));
    RedisConfig { also_prefix: also.iter().map(|prefix| (*prefix).to_owned()).collect(), ..config.redis }
}

fn env(name: &str) -> Option<String> {
    match name {
        "DATABASE_URL" => Some("postgresql+asyncpg://shop:hunter2@db/shop".to_owned()),
        "REDIS_URL" => Some("unix:///run/redis.sock".to_owned()),
        "SECRET" => Some("hunter2".to_owned()),
        "EMPTY" => Some(String::new()),
        _ => None,
    }
}

fn file(text: &str) -> RulesFile {
    RulesFile { path: PathBuf::from("keepstep.toml"), text: text.to_owned() }
}

/// The file resolved; it must have no error.
fn read(text: &str) -> Config {
    let (config, _) = parse(file(text), &env)
        .unwrap_or_else(|problems| panic!("{}", render(&problems.diagnostics, &problems.file, false)));
    config
}

/// Everything that is said of a file.
fn said(text: &str) -> Vec<Diagnostic> {
    match parse(file(text), &env) {
        Ok((_, warnings)) => warnings,
        Err(problems) => problems.diagnostics,
    }
}

fn shown(text: &str) -> String {
    let shown = render(&said(text), &file(text).into(), false);
    assert!(!shown.contains("hunter2"), "{shown}");
    shown
}

/// What is said of each of these files.
fn shown_each(files: impl IntoIterator<Item = String>) -> String {
    files.into_iter().map(|text| shown(&text)).collect::<Vec<_>>().join("\n~~~\n\n")
}

/// Files with one rule each, made of these lines.
fn rules<const N: usize>(lines: [&str; N]) -> String {
    shown_each(lines.map(|lines| format!("{SERVERS}[rule.product]\n{lines}\n")))
}

/// The same, of rules that write keys already.
fn rules_with_key<const N: usize>(lines: [&str; N]) -> String {
    shown_each(lines.map(|lines| format!("{SERVERS}[rule.product]\n{KEY}{lines}\n")))
}

fn servers(postgres: &str, redis: &str, admin: &str) -> String {
    format!("[postgres]\n{postgres}\n[redis]\n{redis}\n[admin]\n{admin}\n{RULE}")
}

#[test]
fn ten_mistakes_are_ten_messages_in_one_run() {
    let text = r#"
[postgres]
url  = "mysql://shop:hunter2@db/shop"

[redis]
url     = "${CACHE_URL}"
timeout = 10

[rule.product]
table   = "products"
key     = "{id}"
value   = "json"
columns = ["id", "name"]
ttl     = 300
strings = ["nmae"]

[rule.category.vars]
page  = "https://shop.example/c/{id}/"
table = "public.categories"

[rule.category]
colums = ["id"]
delete = ["page:{page|md6}"]
"#;
    let shown = shown(text);
    insta::assert_snapshot!(shown);
    let errors = said(text).iter().filter(|diagnostic| diagnostic.severity == Severity::Error).count();
    assert_eq!(errors, 10);
}

#[test]
fn mistakes_in_the_servers() {
    let postgres = |lines: &str| servers(lines, "url = \"redis://cache\"", "");
    let redis = |lines: &str| servers("url = \"postgresql://db\"", lines, "");
    let admin = |lines: &str| servers("url = \"postgresql://db\"", "url = \"redis://cache\"", lines);
    let files = [
        postgres("slot = \"keepstep\""),
        postgres("url = 5432"),
        postgres("url = \"host=db password=hunter2\""),
        postgres("url = \"mysql://root:hunter2@db/shop\""),
        postgres("url = \"${EMPTY}\""),
        postgres("url = \"postgresql://db\"\nsource = \"outbx\"\non_full = \"drop\""),
        postgres("url = \"postgresql://db\"\npoll_interval = \"1s\""),
        postgres("url = \"postgresql://db\"\nslot = \"Keep-Step\""),
        postgres("url = \"postgresql://db\"\nslot = \"\"\npublication = \"\""),
        postgres("url = \"postgresql://db\"\non_gap = \"stopp\""),
        postgres("url = \"postgresql://db\"\nheartbeat = \"1ms\"\nreplay_window = \"off\""),
        postgres("url = \"postgresql://db\"\nmax_retained = \"8\""),
        postgres("url = \"postgresql://db\"\nmax_retained = \"1 byte\""),
        postgres("url = \"postgresql://db\"\nprefix = \"shop:\""),
        postgres("url = \"postgresql://db\"\npassword = \"hunter2\""),
        postgres("url = \"postgresql://db\"\nwarm_rate = 5000\nquery_connections = 0"),
        postgres("url = \"postgresql://db\"\nwarm_rate = \"5000\"\nmessage_commands = [\"warm\", \"verfy\"]"),
        redis("url = \"http://cache\""),
        redis("url = \"redis+cluster://cache\""),
        redis("url = \"redis://cache\"\nalso_prefix = [\"old:\"]"),
        redis("url = \"redis://cache\"\nprefix = \"shop:\"\nalso_prefix = [\"shop:v1:\", \"\", \"a\", \"a:\"]"),
        redis(
            "url = \"redis://cache\"\nprefix = \"9:\"\nalso_prefix = [\"0:\", \"1:\", \"2:\", \"3:\", \"4:\", \"5:\", \"6:\", \"7:\", \"8:\"]",
        ),
        redis("url = \"redis://cache\"\nprefix = \"shop:\"\nalso_prefix = \"old:\""),
        redis("url = \"redis://cache\"\nwait_replicas = -1\nbatch_ops = \"100\"\nbatch_bytes = 4096"),
        redis("url = \"redis://cache\"\nca_file = \"/etc/ca.pem\""),
        redis("url = \"rediss://cache\"\nclient_cert = \"/etc/cert.pem\"\nca_file = \"\""),
        admin("listen = \"localhost:80\""),
        admin("listen = false"),
        admin("token = \"\""),
        admin("token = 1234"),
    ];
    let shown = shown_each(files);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_what_is_filled_in() {
    let files = [
        servers("url = \"${PG_URL}\"", "url = \"redis://:${file:/nowhere/password}@cache\"", "token = \"${SECRET\""),
        servers("url = \"postgresql://${SECRET}/${}\"", "url = \"${A:-${B}}\"", "token = \"${EMPTY}\""),
        servers("url = \"${SECRET}\"", "url = \"redis://x\"\ntimeout = \"${SECRET}\"", ""),
        servers("url = \"mysql://u:${SECRET}@db\"", "url = \"redis://x\"\nprefix = \"$${a}$b\"", ""),
    ];
    let shown = shown_each(files);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_the_tables_of_the_file() {
    let files = [
        String::new(),
        "# nothing yet\n".to_owned(),
        RULE.to_owned(),
        SERVERS.to_owned(),
        format!("{SERVERS}[rule]\ntable = \"public.products\"\n"),
        format!("{SERVERS}[[rule]]\ntable = \"public.products\"\n"),
        format!("{SERVERS}[rules.product]\ntable = \"public.products\"\n"),
        format!("{SERVERS}[product]\ntable = \"public.products\"\n{RULE}"),
        format!("{SERVERS}[rule.\"a b\"]\ntable = \"public.a\"\ndelete = [\"a\"]\n"),
        format!("{SERVERS}{RULE}[query.page]\nsql = \"select 1\"\n"),
        format!("url = \"redis://cache\"\ncolour = \"red\"\ninclude = []\n{SERVERS}{RULE}"),
        format!("admin = \"off\"\n{SERVERS}{RULE}[somewhere]\n"),
        format!("{SERVERS}[defaults]\nkey = \"product:{{id}}\"\nevery = \"12h\"\n{RULE}"),
    ];
    let shown = shown_each(files);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_the_syntax() {
    let files = [
        format!("{SERVERS}{RULE}changed = [\"a\"\non = [\"update\"]\nvars = {{ a = \"x\"\n"),
        format!("{SERVERS}{RULE}nonsense here\nchanged = [\n  \"a\"\n  \"b\",\n]\n"),
        format!("{SERVERS}{RULE}key = ${{KEY}}\nttl = 12h\nvalue = \"\"\"json\n"),
        format!("{SERVERS}{RULE}[rule.feed]\ntable = \"public.feeds\"\n"),
        format!("{SERVERS}[rule.feed\ntable = \"public.feeds\"\n[rule.product]\ndelete = [\"a\"]\n"),
        "[postgres]\nurl = \"postgresql://shop:hunter2@db\n".to_owned(),
        servers("url = postgresql://shop:hunter2@db", "url = redis://:hunter2@cache # of ours", "token = hunter2"),
    ];
    let shown = shown_each(files);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_what_a_rule_is_for() {
    let shown = rules([
        "delete = [\"a\"]",
        "table = \"products\"\ndelete = [\"a\"]",
        "table = \"shop.public.products\"\ndelete = [\"a\"]",
        "table = \"public.\"\ndelete = [\"a\"]",
        "table = \"public.products\"",
        "table = \"public.products\"\nvalue = \"json\"",
        "table = \"public.products\"\nkey = \"a:{id}\"",
        "table = \"public.products\"\ndelete = [\"a\"]\nttl = \"1d\"",
        "table = \"public.products\"\ndelete = \"feed:global\"",
        "table = \"public.products\"\ndelete = []",
        "table = \"public.products\"\ndelete = [\"a\", \"a\", 1]",
        "table = \"public.products\"\ndelete = [\"{id}\", \"keepstep:x\", \"a:{id|lowr}\"]",
        "table = \"public.products\"\ndelete = [\"a:${SHARD}:{id}\", \"b:${id}\"]",
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_the_fields_of_a_rule() {
    let shown = rules_with_key([
        "when = \"row.active\"",
        "ky = \"x\"",
        "prefix = \"shop:\"",
        "colour = \"red\"",
        "on = []",
        "owns = \"true\"",
        "on = \"insert\"",
        "on = [\"insert\", \"truncate\", \"insert\"]",
        "changed = [\"name\"]\non = [\"insert\"]",
        "strings = [\"nmae\"]",
        "rename = { nmae = \"title\", id = 1 }",
        "rename = { id = \"name\" }",
        "rename = { id = \"x\", name = \"x\" }",
        "vars = { url = \"https://shop.example/{id}/\" }",
        "vars = { url = 1 }",
        "[rule.product.vars]\nurl = \"x{id}\"\nttl = \"1d\"",
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_patterns() {
    const VALUE: &str = "value = \"json\"\ncolumns = [\"*\"]";
    let shown = rules([
        "table = \"tenant_*\"\ndelete = [\"a\"]",
        "table = '\"tenant_*\".products'\ndelete = [\"a\"]",
        "table = \"{_schema}.products\"\ndelete = [\"a\"]",
        "table = \"tenant_*.products\"\nvars = { _pk = \"{id}\" }\ndelete = [\"a:{_pk}\"]",
        &format!("table = \"tenant_*.products\"\nkey = \"product:{{id}}\"\n{VALUE}"),
        &format!("table = \"tenant_*.orders_*\"\nkey = \"order:{{_schema}}:{{id}}\"\n{VALUE}"),
        &format!("table = \"*.orders_*\"\nvars = {{ t = \"{{_table|lower}}\" }}\nkey = \"o:{{t}}:{{id}}\"\n{VALUE}"),
        &format!("table = \"public.products\"\nkey = \"{{_pk}}\"\n{VALUE}"),
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_lookups() {
    let shown = rules([
        "table = \"public.faculty\"\ndelete = [\"a:{dept}\"]\nlookup = \"select 'x as dept\"",
        "table = \"public.faculty\"\ndelete = [\"a:{dept}\"]\nlookup = \"select $1 as dept;\"",
        "table = \"public.faculty\"\ndelete = [\"a:{dept}\"]\nlookup = \"\"",
        "table = \"public.faculty\"\ndelete = [\"a:{dept}\"]\nlookup = [\"select 1 as dept\"]",
        "table = \"public.faculty\"\nlookup = \"select 1 as dept\"\npublish = { channel = \"a\" }",
        "table = \"public.faculty\"\nkey = \"a:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\nlookup = \"select 1 as x\"",
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_what_is_deleted_again() {
    let shown = rules([
        "table = \"public.a\"\nredelete = \"2m\"\ndelete = [\"a\"]",
        "table = \"public.a\"\nredelete = 30\ndelete = [\"a\"]",
        "table = \"public.a\"\nredelete = \"later\"\ndelete = [\"a\"]",
        "table = \"public.a\"\nredelete = \"30s\"\nbump = [\"a\"]",
        "table = \"public.a\"\nredelete = \"30s\"\nlookup = \"select 1 as b\"\ndelete = [\"a:{b}\"]",
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_tags() {
    let shown = rules([
        "table = \"public.faculty\"\nkey = \"a:{id}\"\nvalue = \"json\"\ncolumns = [\"id\"]\ntags = [\"a\"]",
        "table = \"public.faculty\"\nkey = \"a\"\nvalue = \"set\"\nmember = \"{id}\"\ntags = [\"a\"]",
        "table = \"public.faculty\"\ntags = [\"a\"]\ndelete_tags = [\"{id}\", \"a\", \"a\"]",
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_queries() {
    let on = "[[query.page.on]]\ntable = \"public.products\"\n";
    let key = "key = \"page:{category}\"\n";
    let params = "params = { category = \"{category_id}\" }";
    let refresh = "mode = \"refresh\"\nsql = \"select :category\"\nshape = \"value\"\n";
    let files = [
        format!("{key}mode = \"refresh\"\n{on}params = {{ category = \"{{category_id}}\" }}"),
        format!("{key}mode = \"refresh\"\nsql = \"select 1; select 2\"\n{on}{params}"),
        format!("{key}mode = \"refresh\"\nsql = \"select 1\"\nshape = \"list\"\n{on}{params}"),
        format!("{key}mode = \"refresh\"\nsql = \"select 1\"\n{on}{params}"),
        format!("{key}mode = \"refresh\"\nshape = \"rows\"\nmax_keys = 0\nmin_interval = \"100\"\n{on}{params}"),
        format!("{key}mode = \"delete\"\nsql = \"select 1\"\nshape = \"row\"\nttl = \"1h\"\n{on}{params}"),
        format!("{key}mode = \"refresh\"\nsql = \"select :category, :tenant\"\nshape = \"row\"\n{on}{params}"),
        format!("{key}{refresh}keys = \"select :a\"\nttl = \"1h\"\nevery = \"1h\"\n{on}{params}"),
        format!("{key}{refresh}every = \"1h\"\n{on}{params}"),
        format!("key = \"page\"\n{}keys = \"select 1\"\n{on}", refresh.replace(":category", "1")),
        format!("key = \"page:{{category|lower}}\"\n{refresh}{on}{params}"),
        format!("key = \"page:{{category?none}}\"\n{refresh}jitter = \"10%\"\n{on}{params}"),
        format!("{key}mode = \"delete\"\n{on}"),
        format!("{key}mode = \"delete\"\n{on}params = {{ category = \"{{category_id}}\", other = \"{{id}}\" }}"),
        format!("{key}mode = \"delete\"\n{on}lookup = \"select $1\"\ndelete = [\"a\"]"),
        format!("{key}mode = \"delete\""),
        format!("{key}mode = \"delete\"\non = []"),
        format!("{key}mode = \"delete\"\non = {{ table = \"public.products\" }}"),
        "mode = \"delete\"\non = [\"public.products\"]".to_owned(),
    ];
    let shown = shown_each(files.map(|lines| format!("{SERVERS}[query.page]\n{lines}\n")));
    let nameless = shown_each(
        ["[query]\nkey = \"a\"\n", "[[query]]\nkey = \"a\"\n", "[query.\"a b\"]\n"]
            .map(|text| format!("{SERVERS}{text}")),
    );
    insta::assert_snapshot!(format!("{shown}\n~~~\n\n{nameless}"));
}

#[test]
fn mistakes_in_values_and_columns() {
    let key = "table = \"public.products\"\nkey = \"product:{id}\"\n";
    let lines = [
        "value = \"hash\"\ncolumns = [\"id\"]",
        "value = \"xml\"\ncolumns = []",
        "value = \"json\"\ncolumns = \"*\"",
        "value = \"json\"\ncolumns = [\"*\", \"id\"]",
        "value = \"json\"\ncolumns = [\"id\", \"id\", \"\"]",
    ];
    let shown = shown_each(lines.map(|lines| format!("{SERVERS}[rule.product]\n{key}{lines}\n")));
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_how_long_keys_live() {
    let shown = rules_with_key([
        "ttl = 300",
        "ttl = \"300\"",
        "ttl = \"12 parsecs\"",
        "ttl = \"1ms\"",
        "ttl = \"1d\"",
        "jitter = \"10%\"",
        "ttl = \"1d\"\njitter = 0.1",
        "ttl = \"1d\"\njitter = \"100%\"",
        "write = \"presnt\"",
        "on_delete = \"keep\"",
        "ttl = \"1d\"\nevery = \"12h\"",
        "every = \"12h\"",
        "ttl = \"1d\"\nevery = \"1d\"",
        "ttl = \"1d\"\njitter = \"60%\"\nevery = \"12h\"",
        "ttl = \"1d\"\nevery = \"12h\"\nwarm = false",
        "keep_ttl = true\nevery = \"12h\"",
        "ttl = \"1d\"\nevery = \"100ms\"",
    ]);
    insta::assert_snapshot!(shown);
}

#[test]
fn mistakes_in_how_keys_are_filled_and_compared() {
    let shown = rules_with_key(["warm = \"false\"", "warm = 1", "audit = \"1%\"", "audit = 0.01", "audit = false"]);
    insta::assert_snapshot!(shown);
    assert!(said(&format!("{SERVERS}{RULE}warm = true\n")).iter().any(|said| said.title.contains("needs `key`")));
}

/// A piece of a rules file, with the tables that it lacks.
fn completed(piece: &str) -> String {
    let has = |table: &str| piece.contains(table);
    if has("[postgres]") && has("[redis]") {
        return piece.to_owned();
    }
    let postgres = if has("[postgres]") { "" } else { "[postgres]\nurl = \"postgresql://db\"\n" };
    let redis = if has("[redis]") { "" } else { "[redis]\nurl = \"redis://cache\"\n" };
    let rule = if has("rule") { "" } else { RULE };
    format!("{piece}\n{postgres}{redis}{rule}")
}

/// Those that begin with statements are tried on a server (`tests/integration/codes.rs`).
#[test]
fn the_examples_of_the_codes_are_what_they_say() {
    for known in code::CODES.iter().filter(|known| !known.wrong.starts_with("CREATE")) {
        let found = |piece: &str| said(&completed(piece)).iter().any(|diagnostic| diagnostic.code == known.code);
        assert_eq!(found(known.wrong), !known.wrong.is_empty(), "{}:\n{}", known.code, shown(&completed(known.wrong)));
        assert_eq!(said(&completed(known.right)), [], "{}", known.code);
    }
}

#[test]
fn one_default_is_one_remark() {
    let rule = |name: &str| format!("[rule.{name}]\n{}", KEY.replace("product:", &format!("{name}:")));
    let text = format!("{SERVERS}[defaults]\nttl = \"1d\"\n{}{}", rule("a"), rule("b"));
    assert_eq!(said(&text).len(), 1);
    assert_eq!(said(&format!("{text}write = \"present\"\n")).len(), 1);
    assert_eq!(said(&format!("{SERVERS}[defaults]\nttl = \"1d\"\nwrite = \"present\"\n{}", rule("a"))), []);
}

#[test]
fn a_whole_file_is_resolved() {
    let text = format!(
        "[postgres]\nurl = \"${{DATABASE_URL}}\"\nheartbeat = \"off\"\non_gap = \"stop\"\n\
         warm_rate = \"5000/s\"\nquery_connections = 4\nmessage_commands = [\"reload\", \"warm\"]\n\
         [redis]\nurl = \"${{REDIS_URL}}\"\nprefix = \"shop:v1:\"\nalso_prefix = [\"shop:v0:\"]\nbatch_bytes = \"1MiB\"\n\
         [admin]\nlisten = \"off\"\ntoken = \"${{SECRET}}\"\n\
         [defaults]\nttl = \"1d\"\njitter = \"10%\"\nwrite = \"present\"\naudit = \"1%/min\"\nwarm = false\n\
         [rule.product]\n{KEY}jitter = \"5%\"\nvars = {{ page = \"{{id}}/\" }}\ndelete = [\"page:{{page|md5}}\"]\n\
         [rule.all]\ntable = 'public.\"a.\"\"b\"\"\"'\non = [\"insert\", \"delete\"]\nkey = \"all:{{id}}\"\n\
         value = \"json\"\ncolumns = [\"*\"]\nttl = \"off\"\nwrite = \"always\"\naudit = \"off\"\nwarm = true\n\
         owns = true\n"
    );
    let config = read(&text);
    assert_eq!(config.postgres.url.expose(), "postgresql://shop:hunter2@db/shop");
    assert_eq!((config.postgres.heartbeat, config.postgres.on_gap), (None, OnGap::Stop));
    assert_eq!((config.postgres.warm_rate, config.postgres.query_connections), (Some(5000), 4));
    let commands = MessageCommands { warm: true, verify: false, reload: true };
    assert_eq!(config.postgres.message_commands, commands);
    assert_eq!(config.redis.url.expose(), "redis+unix:///run/redis.sock");
    assert_eq!((config.redis.prefix.as_str(), config.redis.batch_bytes), ("shop:v1:", 1 << 20));
    assert_eq!(config.redis.prefixes().collect::<Vec<_>>(), ["shop:v1:", "shop:v0:"]);
    assert_eq!(config.admin.listen, None);
    assert!(!format!("{config:?}").contains("hunter2"));

    let [product, all] = config.rules.as_slice() else { panic!("{:?}", config.rules) };
    assert_eq!(product.name.value, "product");
    assert_eq!(&text[product.name.span.clone()], "product");
    let write = product.write.as_ref().unwrap();
    assert_eq!((write.present_only, write.owns), (true, false));
    let Life::Ttl(Lifetime::Constant(ttl), jitter) = write.life else { panic!("{:?}", write.life) };
    assert_eq!((ttl, jitter.to_bits()), (Duration::from_secs(86_400), 0.05_f64.to_bits()));
    assert_eq!((write.warm, write.audit), (false, Some(0.01)));
    assert_eq!(&text[write.key.span.clone()], "\"product:{id}\"");

    assert_eq!(all.table.value, TableName { schema: "public".to_owned(), name: "a.\"b\"".to_owned() });
    assert_eq!((all.on, all.on_given), (Operations { update: false, ..Operations::ALL }, true));
    let write = all.write.as_ref().unwrap();
    assert_eq!((write.present_only, write.owns), (false, true));
    let (Life::Forever, Value::Row(row)) = (&write.life, &write.value) else { panic!("{write:?}") };
    assert_eq!(row.columns.value, ColumnSelection::All);
    assert_eq!((write.warm, write.audit), (true, None));
}

#[test]
fn fingerprints_follow_what_decides_keys_and_values() {
    let fingerprint = |rule: &str| read(&format!("{SERVERS}{rule}")).rules.remove(0).fingerprint;
    let base = format!("[rule.product]\n{KEY}strings = [\"id\", \"name\"]\ndelete = [\"a\", \"b\"]\n");
    let same = [
        format!("# a comment\n{base}"),
        base.replace("rule.product", "rule.renamed"),
        base.replace("[\"a\", \"b\"]", "[ 'b', 'a' ]"),
        base.replace("strings = [\"id\", \"name\"]\n", "") + "strings = [\"name\", \"id\"]\n",
        format!("{base}on = [\"delete\", \"insert\", \"update\"]\n"),
        format!("{base}warm = false\naudit = \"1%/h\"\n"),
        format!("[defaults]\njitter = \"0%\"\n{base}"),
    ];
    for rule in same {
        assert_eq!(fingerprint(&rule), fingerprint(&base), "{rule}");
    }
    let different = [
        base.replace("public.", "shop."),
        base.replace("product:{id}", "p:{id}"),
        base.replace("[\"id\", \"name\"]\nstrings", "[\"name\", \"id\"]\nstrings"),
        base.replace("[\"a\", \"b\"]", "[\"a\"]"),
        format!("{base}on = [\"insert\"]\n"),
        format!("{base}changed = [\"name\"]\n"),
        format!("{base}ttl = \"1d\"\n"),
        format!("{base}write = \"present\"\n"),
        format!("{base}rename = {{ id = \"key\" }}\n"),
        format!("{base}vars = {{ id = \"x\" }}\n"),
        format!("{base}when = \"row.id > 1\"\n"),
        format!("{base}compute = {{ twice = \"row.id * 2\" }}\n"),
        format!("{base}expire_at = \"row.at\"\n"),
        format!("{base}keep_ttl = true\n"),
        format!("{base}ttl = \"row.s\"\n"),
        base.replace("value = \"json\"", "value = \"rejson\""),
        format!("[defaults]\non_delete = \"keep\"\n{base}"),
    ];
    for rule in different {
        assert_ne!(fingerprint(&rule), fingerprint(&base), "{rule}");
    }
    let lookup = |sql: &str| {
        fingerprint(&format!("[rule.r]\ntable = \"public.t\"\nlookup = \"{sql}\"\ndelete = [\"a:{{b}}\"]\n"))
    };
    assert_ne!(lookup("select b from t where id = :id"), lookup("select c as b from t where id = :id"));
}

/// A file that gives every field of the table the value that `value` chooses for it, if any.
fn file_of(value: impl Fn(&fields::Field) -> Option<&'static str>) -> String {
    let mut tables: BTreeMap<&str, String> = BTreeMap::new();
    // What is a table of its own stands in the example of its field.
    for field in FIELDS.iter().filter(|field| Table::AT_TOP.contains(&field.table)) {
        let header = field.table.header().replace("NAME", "product");
        let lines = tables.entry(field.table.key()).or_insert_with(|| format!("{header}\n"));
        if let Some(value) = value(field) {
            lines.push_str(&format!("{} = {value}\n", field.name));
        }
    }
    tables.into_values().collect()
}

const KEPT: &str = "key = \"kept:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\nkeep_ttl = true\n";

#[test]
fn every_field_of_the_table_is_read_and_takes_its_example() {
    // What needs another value than the reference shows, to stand beside the others.
    let value = |field: &fields::Field| {
        Some(match (field.table, field.name) {
            (Table::Redis, "url") => "\"rediss://cache\"",
            (Table::Admin, "token") => "\"${SECRET}\"",
            (Table::Rule, "lookup" | "template" | "member" | "score" | "expire_at" | "keep_ttl" | "every") => {
                return None;
            }
            _ => field.example,
        })
    };
    let others = [("string", vec!["template", "expire_at"]), ("zset", vec!["member", "score"])];
    let example = |name: &&str| format!("{name} = {}\n", Table::Rule.field(name).expect("a field").example);
    let rule = |(kind, fields): (&str, Vec<&str>)| {
        let fields: String = fields.iter().map(example).collect();
        format!("[rule.{kind}]\ntable = \"public.t\"\nkey = \"{kind}:{{id}}\"\nvalue = \"{kind}\"\n{fields}")
    };
    let again = format!(
        "[rule.again]\ntable = \"public.t\"\n{}{}warm = true\n",
        KEPT.replace("kept", "again"),
        example(&"every")
    )
    .replace("keep_ttl = true", "ttl = \"1d\"");
    let text = file_of(value)
        + &others.map(rule).concat()
        + "[rule.kept]\ntable = \"public.t\"\n"
        + KEPT
        + &again
        + "[rule.looked-up]\ntable = \"public.t\"\ndelete = [\"a:{dept}\"]\n"
        + &example(&"lookup");
    let errors = said(&text).into_iter().filter(|diagnostic| diagnostic.severity == Severity::Error);
    assert_eq!(errors.collect::<Vec<_>>(), [], "{text}");
}

#[test]
fn the_defaults_of_the_table_are_those_that_hold() {
    let needed = |field: &fields::Field| match (field.table, field.name) {
        (Table::Postgres | Table::Redis, "url")
        | (Table::Postgres, "source")
        | (Table::Rule, "table" | "key" | "value" | "columns" | "delete") => Some(field.example),
        (Table::Query, _) => Some(field.example),
        _ => None,
    };
    // A jitter needs a TTL, so the default of the one excludes that of the other; and so it is with the source and what an
    // outbox alone takes.
    let excluding = [(Table::Rule, "jitter"), (Table::Postgres, "source")];
    let given = |field: &fields::Field| match field.default {
        Fallback::Value(value) if !excluding.contains(&(field.table, field.name)) => Some(value),
        _ => needed(field),
    };
    let described = |text: &str| {
        let Config { file: _, postgres, redis, admin, rules, open: _, tables: _ } = read(text);
        let unprinted = |rule: &Rule| rule.write.as_ref().map(|write| (write.warm, write.audit));
        let rules: Vec<_> = rules.iter().map(|rule| (&rule.fingerprint, unprinted(rule))).collect();
        format!("{postgres:?} {redis:?} {admin:?} {rules:?}")
    };
    assert_eq!(described(&file_of(given)), described(&file_of(needed)));
}

#[test]
fn a_file_that_cannot_be_read_is_said_to_be_so() {
    let folder = tempfile::tempdir().unwrap();
    let message = |path: &Path| {
        let problems = load(path, &env).unwrap_err();
        render(&problems.diagnostics, &problems.file, false)
    };
    assert!(message(&folder.path().join("none.toml")).contains("cannot be read: No such file"));
    let binary = folder.path().join("binary.toml");
    std::fs::write(&binary, b"a = \"\xff\"").unwrap();
    assert!(message(&binary).contains("did not contain valid UTF-8"));
    std::fs::write(&binary, format!("{SERVERS}{RULE}")).unwrap();
    assert_eq!(load(&binary, &env).unwrap().0.rules.len(), 1);
}

/// Whether every span lies in the file, on character boundaries, and the whole can be shown.
fn check_spans(text: &str) {
    let diagnostics = said(text);
    for diagnostic in &diagnostics {
        for label in std::iter::once(&diagnostic.primary).chain(&diagnostic.context) {
            assert!(text.get(label.span.clone()).is_some(), "{diagnostic:?}");
        }
    }
    assert!(!render(&diagnostics, &file(text).into(), true).contains("hunter2"), "{text}");
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_at_places_in_it(text in "\\PC{0,80}") {
        check_spans(&text);
    }

    #[test]
    fn any_mixture_of_toml_is_too(pieces in prop::collection::vec(piece(), 0..40)) {
        check_spans(&pieces.concat());
    }

    #[test]
    fn a_file_with_damage_anywhere_is_too(
        at in 0_usize..600,
        length in 0_usize..4,
        put in "[\\[\\]{}\"'=.#$\\n\\r\\té,]{0,3}",
    ) {
        let mut text = format!("{SERVERS}{RULE}[rule.product]\n{KEY}ttl = \"1d\"\nvars = {{ a = 'é{{id}}' }}\n");
        let boundary = |at: usize, text: &str| {
            (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap()
        };
        let start = boundary(at, &text);
        let end = boundary(start + length, &text).max(start);
        text.replace_range(start..end, &put);
        check_spans(&text);
    }
}

/// Pieces that files are made of.
fn piece() -> impl Strategy<Value = String> {
    let words: Vec<_> = FIELDS
        .iter()
        .flat_map(|field| [field.name, field.example])
        .chain(["[postgres]\n", "[redis]\n", "[rule.a]\n", "[rule.a.vars]\n", "[[rule]]\n", "[defaults]\n", "rule."])
        .chain(["=", "\n", " ", "[", "]", "{", "}", "\"", "'", "\"\"\"", "'''", ",", "#", "${"])
        .chain(["\\u00e9", "é", "\r\n"])
        .chain([
            "\"postgresql://a:hunter2@b\"",
            "token = hunter2\n",
            "redis://:hunter2@",
            "12h",
            "300",
            "-1",
            "0x10",
            "1e400",
            "2020-01-01",
            "true",
        ])
        .map(str::to_owned)
        .collect();
    prop::sample::select(words)
}
