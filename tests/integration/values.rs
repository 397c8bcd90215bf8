//! Values to JSON, with Postgres as the oracle: whatever a column holds, `write_json` of its text form is what
//! `row_to_json` shows.
//!
//! The text form comes from the simple query protocol, which calls each type's output function as pgoutput does; a
//! cast to text does not (`true::text` is `true`, its output is `t`).

use std::path::Path;

use keepstep::decode::types::{JsonType, Types};
use keepstep::decode::value::write_json;
use keepstep::sandbox::Postgres;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

mod sql;

/// The settings of every session that reads values, and the types of every kind that a database can add.
const SET_UP: &str = r#"
    set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'; set extra_float_digits = 1;
    create type mood as enum ('ok', 'so "so"', 'back\slash', '{a,b}', '(c)', 'NULL', ' ', 'ü');
    create domain positive as int check (value > 0);
    create domain very_positive as positive check (value > 9);
    create domain labels as text[];
    create domain doc as jsonb;
    create domain raw_doc as json;
    create domain moment as timestamptz;
    create type place as (x int, dropped text, "y ""z""" float8, label text);
    alter type place drop attribute dropped;
    create domain known_place as place;
    create type order_line as (
        id bigint, at timestamptz, on_day date, tags text[], place place, places place[], doc json, docs jsonb[],
        ok bool, mood mood, moods mood[], labels labels, positive very_positive, moments moment[], span tstzrange
    );
    create type alone as (only_one text);
    create type nobody as ();
    create table past (a int, b text, "C" timestamp);
    alter table past drop column b;
    create type text_range as range (subtype = text, collation = "C");
"#;

/// A server, and what its catalog says of the types of a list of columns.
struct Oracle {
    client: Client,
    runtime: Runtime,
    _server: Postgres,
}

impl Oracle {
    fn start() -> Self {
        let server = Postgres::start_copy(Path::new(env!("CARGO_TARGET_TMPDIR")), "").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let client = runtime.block_on(async {
            let (client, connection) = tokio_postgres::connect(&server.url("postgres"), NoTls).await.unwrap();
            tokio::spawn(connection);
            client.batch_execute(SET_UP).await.unwrap();
            client
        });
        Oracle { client, runtime, _server: server }
    }

    /// Whether the server was built with what these statements need; says so where it was not.
    fn has(&self, what: &str, statements: &str) -> bool {
        let there = self.runtime.block_on(self.client.batch_execute(statements)).is_ok();
        if !there {
            eprintln!("this server has no {what}: its values are not tested");
        }
        there
    }

    fn oids(&self, names: &[&str]) -> Vec<u32> {
        let query =
            "select array_agg(name::regtype::oid order by at) from unnest($1::text[]) with ordinality n(name, at)";
        self.runtime.block_on(self.client.query_one(query, &[&names])).unwrap().get(0)
    }

    fn load(&self, oids: &[u32]) -> keepstep::error::Result<Types> {
        self.runtime.block_on(Types::load(&self.client, oids))
    }

    fn types(&self, names: &[&str]) -> Vec<JsonType> {
        let oids = self.oids(names);
        let types = self.load(&oids).unwrap();
        oids.iter().map(|&oid| JsonType::clone(&types.get(oid).json)).collect()
    }

    /// One row of these SQL expressions: what `row_to_json` shows, and what we make of the text forms.
    fn both(&self, types: &[JsonType], expressions: &[String]) -> Result<(String, String), String> {
        let columns: Vec<String> =
            expressions.iter().enumerate().map(|(at, expression)| format!("{expression} as c{at}")).collect();
        let query = format!("select row_to_json(r), r.* from (select {}) r", columns.join(", "));
        let messages = self.runtime.block_on(self.client.simple_query(&query));
        let messages = messages.map_err(|error| format!("{:?}", error.as_db_error()))?;
        let mut rows = messages.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        let row = rows.next().unwrap();
        let values: Vec<Option<&str>> = (1..row.len()).map(|at| row.get(at)).collect();
        Ok((row.get(0).unwrap().to_owned(), row_json(types, &values)?))
    }
}

/// An object with the fields `c0`, `c1`, …
fn row_json(types: &[JsonType], values: &[Option<&str>]) -> Result<String, String> {
    assert_eq!(types.len(), values.len());
    let mut out = b"{".to_vec();
    for (at, (json, value)) in types.iter().zip(values).enumerate() {
        let comma = if at > 0 { "," } else { "" };
        out.extend_from_slice(format!("{comma}\"c{at}\":").as_bytes());
        match value {
            None => out.extend_from_slice(b"null"),
            Some(text) => write_json(&mut out, json, text.as_bytes()).map_err(|error| format!("{error}: {text}"))?,
        }
    }
    out.push(b'}');
    Ok(String::from_utf8(out).unwrap())
}

/// A type and the SQL literals to try, without their quotes.
const HAND_PICKED: &[(&str, &[&str])] = &[
    ("bool", &["t", "f"]),
    ("int2", &["-32768", "0"]),
    ("int8", &["-9223372036854775808", "9223372036854775807"]),
    ("float4", &["NaN", "Infinity", "-Infinity", "-0", "1e-45", "3.4028235e38", "0.1", "16777216"]),
    ("float8", &["NaN", "Infinity", "-Infinity", "-0", "1e300", "5e-324", "1e15", "1e16", "1e-5", "0.1", "123456.789"]),
    ("numeric", &["NaN", "Infinity", "-Infinity", "0", "-0.00", "1.50", "1e100", "1e-30", "-123456789012345678901.5"]),
    ("numeric(10,4)", &["1", "-1.23456"]),
    ("money", &["1234.5", "-0.01"]),
    ("oid", &["0", "4294967295"]),
    ("xid", &["42"]),
    ("xid8", &["18446744073709551615"]),
    ("pg_lsn", &["16/B374D848"]),
    ("regclass", &["pg_class", "0"]),
    ("regtype", &["timestamptz", "int4[]"]),
    ("text", &["", "NULL", "null", "a\u{1}\u{8}\t\n\u{b}\u{c}\r\u{1f} \u{7f}\u{80}/\\\"''<>&", "ü€😀\u{2028}\u{feff}"]),
    ("varchar(3)", &["abcdef", ""]),
    ("char(5)", &["ab", "", "abcdef"]),
    (r#""char""#, &["x", "", "\\001", "\\377"]),
    ("name", &["a \"name\""]),
    ("bytea", &["", "\\x00ff5c27", "text"]),
    ("bit(4)", &["1010"]),
    ("varbit", &["", "101"]),
    ("uuid", &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"]),
    ("json", &["null", " {\"a\" : [1, 2.0,\n\"\\u00fc\\\"\"], \"a\":{}} ", "\"x\""]),
    ("jsonb", &["null", "{\"b\": 1e2, \"a\": [true, \"\\u00fc\\\"\\\\ \"]}", "\"x\"", "[]"]),
    ("jsonpath", &["$.a[*] ? (@ > \"x\")"]),
    ("date", &["2024-02-29", "0001-01-01 BC", "4713-01-01 BC", "5874897-12-31", "infinity", "-infinity", "0001-01-01"]),
    ("time", &["00:00", "24:00:00", "12:34:56.789"]),
    ("timetz", &["12:34:56.789+05:30", "00:00-15:59:59", "00:00+00"]),
    (
        "timestamp",
        &["2024-02-29 12:00", "0044-03-15 12:00:00.5 BC", "294276-12-31 23:59:59.999999", "infinity", "-infinity"],
    ),
    (
        "timestamptz",
        &["2024-02-29 12:00+05:30", "0044-03-15 12:00 BC", "10000-01-01 00:00:00.000001+00", "infinity", "-infinity"],
    ),
    (
        "interval",
        &["1 year -2 mons 3 days -04:05:06.789", "0", "-1 day", "100 years", "-00:00:00.000001", "1 day -1 hour"],
    ),
    ("inet", &["10.0.0.1", "10.0.0.0/8", "::1/128", "2001:db8::/32"]),
    ("cidr", &["10.0.0.0/8", "2001:db8::/32"]),
    ("macaddr", &["08:00:2b:01:02:03"]),
    ("macaddr8", &["08:00:2b:01:02:03:04:05"]),
    ("tsvector", &["", "'a''b':1A,2 'c \"d\"' 'e\\\\f'"]),
    ("tsquery", &["", "'a' & !('b' | 'c\"d':*A) <-> 'e'"]),
    ("point", &["(1.5,-2e300)", "(NaN,Infinity)"]),
    ("box", &["((1,2),(3,4))"]),
    ("path", &["((1,2),(3,4))", "[(1,2),(3,4)]"]),
    ("circle", &["<(1,2),3>"]),
    ("int2vector", &["", "1", "1 -2 3"]),
    ("oidvector", &["", "1 4294967295"]),
    ("int4range", &["empty", "[1,5)", "(,5)", "(,)"]),
    ("tstzrange", &["[2024-01-01,infinity]", "[\"2024-01-01 00:00:00+02\",)"]),
    ("int4multirange", &["{}", "{[1,3),[5,9)}"]),
    ("text_range", &["[\"a \"\"b\\\\\",\"c,]\")", "[\"\"\"\",NULL]"]),
    ("mood", &["ok", "so \"so\"", "back\\slash", "{a,b}", "(c)", "NULL", " ", "ü"]),
    ("very_positive", &["10"]),
    ("labels", &["{}", "{a,NULL,\"NULL\"}"]),
    ("doc", &["{\"a\":1}"]),
    ("raw_doc", &["{\"a\"  :1}"]),
    ("moment", &["2024-01-01"]),
    ("place", &["(,,)", "(1,NaN,\"\")", "(1,-0,\"say \"\"hi\"\" \\\\ (you), {me}\")", "(1,2,NULL)", "(1,2, x )"]),
    ("known_place", &["(1,2,x)"]),
    ("alone", &["()", "(\"\")", "(a)", "(NULL)", "(\",\")"]),
    ("nobody", &["()"]),
    ("past", &["(1,2024-01-01)"]),
    ("int4[]", &["{}", "{1,NULL,-3}", "{{1,2},{NULL,4}}", "[0:1]={1,2}", "[-1:0][5:5]={{1},{2}}", "{{{{{{7}}}}}}"]),
    ("bool[]", &["{t,f,NULL}"]),
    ("float8[]", &["{NaN,-Infinity,1e300}"]),
    ("text[]", &["{\"\",a,\"NULL\",NULL,null,\"a b\",\"{\",\"a\\\"\\\\\",\",\"}", "{\"\u{1}\n\u{a0}ü\",\" \"}"]),
    ("char(3)[]", &["{a,\"\"}"]),
    ("json[]", &["{\"{\\\"a\\\" : \\\"\\\\\\\\n,\\\"}\",1,\"null\"}"]),
    ("timestamp[]", &["{2024-01-01,infinity,0044-03-15 BC,NULL}"]),
    ("timestamptz[]", &["{2024-01-01,-infinity,0044-03-15 BC}"]),
    ("date[]", &["{2024-01-01,0044-03-15 BC}"]),
    ("box[]", &["{((1,2),(3,4));((5,6),(7,8))}", "{{((1,2),(3,4))};{NULL}}"]),
    ("point[]", &["{\"(1,2)\",\"(3,4)\"}"]),
    ("int2vector[]", &["{\"1 2\",\"\",3}"]),
    ("labels[]", &["{\"{a,\\\"b c\\\"}\",NULL,\"{}\"}"]),
    ("mood[]", &["{ok,\"so \\\"so\\\"\",\"back\\\\slash\",\"{a,b}\",(c),\"NULL\",\" \",NULL}"]),
    ("place[]", &["{\"(1,2,\\\"a \\\"\\\"b\\\"\\\" \\\\\\\\\\\\\\\\\\\")\",NULL,\"(,,)\"}"]),
    ("nobody[]", &["{()}"]),
    ("known_place[]", &["{\"(1,2,x)\"}"]),
    ("int4range[]", &["{\"[1,2)\",empty}"]),
    ("past[]", &["{\"(1,\\\"2024-01-01 12:00:00\\\")\"}"]),
];

#[test]
fn hand_picked_values_show_as_row_to_json_shows_them() {
    let oracle = Oracle::start();
    let mut picked = HAND_PICKED.to_vec();
    if oracle.has("hstore", "create extension hstore") {
        picked.push(("hstore", &["", "a=>1,b=>NULL,\"c \\\"d\\\\\"=>\"NULL\",\"\"=>\"\u{1}\""]));
        picked.push(("hstore[]", &["{\"\\\"a\\\"=>\\\"1\\\"\",\"\",NULL}"]));
    }
    if oracle.has("citext", "create extension citext") {
        picked.push(("citext", &["A \"b\""]));
    }
    if oracle.has("xml", "select '<a/>'::xml") {
        picked.push(("xml", &["<a b=\"c\">d</a>"]));
    }
    let names: Vec<&str> = picked.iter().map(|(name, _)| *name).collect();
    for (json, (name, literals)) in oracle.types(&names).into_iter().zip(picked) {
        for literal in literals {
            let expression = format!("'{}'::{name}", literal.replace("''", "'").replace('\'', "''"));
            let (shown, ours) = oracle.both(std::slice::from_ref(&json), &[expression]).unwrap();
            assert_eq!(ours, shown, "{literal} as {name}");
        }
    }
}

#[test]
fn random_values_show_as_row_to_json_shows_them() {
    let oracle = Oracle::start();
    let mut columns = [sql::scalars(), sql::containers()].concat();
    if oracle.has("hstore", "create extension hstore") {
        columns.extend(sql::hstores());
    }
    let (names, values): (Vec<&str>, Vec<_>) = columns.into_iter().unzip();
    let types = oracle.types(&names);
    let row: Vec<_> =
        std::iter::zip(names, values).map(|(name, value)| sql::nullable(sql::cast(value, name))).collect();

    let seed = match Config::default().rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => getrandom::u64().unwrap(),
    };
    let config = Config {
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&row, |expressions| {
        let (shown, ours) = oracle.both(&types, &expressions).map_err(TestCaseError::fail)?;
        prop_assert_eq!(ours, shown);
        Ok(())
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, mut row)) => {
            row.retain(|expression| expression != "null");
            panic!("{reason}\nin {row:#?}\nagain with PROPTEST_RNG_SEED={seed}")
        }
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

#[test]
fn arrays_of_built_in_types_are_those_of_the_catalog() {
    let oracle = Oracle::start();
    let query =
        "select array_type.oid, element.oid, element.typdelim::text, array_type.typoutput = 'array_out'::regproc
                   from pg_type array_type join pg_type element on element.oid = array_type.typelem
                  where array_type.typsubscript = 'array_subscript_handler'::regproc
                    and element.typtype in ('b', 'r', 'm') and array_type.oid < 10000";
    let rows = oracle.runtime.block_on(oracle.client.query(query, &[])).unwrap();
    assert!(rows.len() > 70);
    let types = oracle.load(&rows.iter().map(|row| row.get(0)).collect::<Vec<u32>>()).unwrap();
    for row in rows {
        let (oid, delimiter): (u32, &str) = (row.get(0), row.get(2));
        let element = std::sync::Arc::clone(&types.get(row.get(1)).json);
        let expected = match row.get(3) {
            true => JsonType::Array { element, delimiter: delimiter.as_bytes()[0] },
            false => JsonType::Vector(element),
        };
        assert_eq!(*types.get(oid).json, expected, "{}", types.get(oid).name);
    }
}

#[test]
fn types_are_known_by_name_and_base() {
    let oracle = Oracle::start();
    let names = ["int4[]", "very_positive", "labels", "labels[]", "known_place", "place[]", "mood", "text_range"];
    let oids = oracle.oids(&names);
    let types = oracle.load(&oids).unwrap();
    assert_eq!(oids.iter().map(|&oid| &types.get(oid).name).collect::<Vec<_>>(), Vec::from_iter(&names));
    let bases: Vec<u32> = oids.iter().map(|&oid| types.get(oid).base).collect();
    let expected = oracle.oids(&["int4[]", "int4", "text[]", "labels[]", "place", "place[]", "mood", "text_range"]);
    assert_eq!(bases, expected);

    let nobody_has = u32::MAX;
    let unknown = oracle.load(&[nobody_has]).unwrap();
    assert_eq!((unknown.get(nobody_has).base, &*unknown.get(nobody_has).json), (0, &JsonType::Text));
}

#[test]
fn types_that_nest_too_deep_are_refused() {
    let oracle = Oracle::start();
    let chain = (1..40).map(|level| format!("create type t{level} as (inner_value t{});", level - 1));
    let statements = String::from_iter(std::iter::once("create type t0 as (a int);".to_owned()).chain(chain));
    oracle.runtime.block_on(oracle.client.batch_execute(&statements)).unwrap();
    assert!(oracle.load(&oracle.oids(&["t30"])).is_ok());
    let error = oracle.load(&oracle.oids(&["t39"])).unwrap_err();
    assert_eq!(error.to_string(), "a column's type nests more than 32 types");
}
