//! Values to JSON, with Postgres as the oracle: whatever a column holds, `write_json` of its text form is what
//! `row_to_json` shows.
//!
//! The text form comes from the simple query protocol, which calls each type's output function as pgoutput does; a
//! cast to text does not (`true::text` is `true`, its output is `t`).

use keepstep::decode::types::{JsonType, Types};
use keepstep::decode::value::write_json;
use keepstep::sandbox::Postgres;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};
use tokio::runtime::Runtime;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

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
        let server = Postgres::start("").unwrap();
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

/// Columns of many types and SQL expressions for random values of each.
fn columns(hstore: bool) -> Vec<(&'static str, BoxedStrategy<String>)> {
    let text = || text().prop_map(|text| quote(&text)).boxed();
    let int = || any::<i32>().prop_map(|number| number.to_string()).boxed();
    let float = || any_float().prop_map(|number| quote(&float_literal(number))).boxed();
    let timestamptz = || microseconds().prop_map(|us| format!("timestamptz '2000-01-01' + {us} * interval '1 us'"));
    let timestamptz = || timestamptz().boxed();
    let mood = || select(&["ok", "so \"so\"", "back\\slash", "{a,b}", "(c)", "NULL", " ", "ü"][..]).prop_map(quote);
    let date = || (-2_451_500..100_000_000).prop_map(|days| format!("date '2000-01-01' + {days}")).boxed();
    let json = || json().prop_map(|json| quote(&json)).boxed();
    let tags = || array_of(text(), "text");
    let place = || composite("place", vec![int(), float(), text()]);
    let span = || {
        let bounds = select(&["[]", "[)", "(]", "()"][..]);
        (microseconds(), microseconds(), bounds).prop_map(|(one, other, bounds)| {
            let at = |us| format!("timestamptz '2000-01-01' + {us} * interval '1 us'");
            format!("tstzrange({}, {}, '{bounds}')", at(one.min(other)), at(one.max(other)))
        })
    };
    let line = || {
        let id = any::<i64>().prop_map(|id| id.to_string()).boxed();
        let places = array_of(place(), "place");
        let (docs, moods) = (array_of(json(), "jsonb"), array_of(mood().boxed(), "mood"));
        let ok = any::<bool>().prop_map(|ok| ok.to_string()).boxed();
        let (positive, moments) =
            ((10..i32::MAX).prop_map(|n| n.to_string()).boxed(), array_of(timestamptz(), "moment"));
        composite(
            "order_line",
            vec![
                id,
                timestamptz(),
                date(),
                tags(),
                place(),
                places,
                json(),
                docs,
                ok,
                mood().boxed(),
                moods,
                tags(),
                positive,
                moments,
                span().boxed(),
            ],
        )
    };
    let bytes = vec(any::<u8>(), 0..20).prop_map(|bytes| {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("'\\x{hex}'")
    });
    let interval = [any::<i16>(), any::<i16>(), any::<i16>(), any::<i16>()];
    let interval = (interval, any::<i32>()).prop_map(|([years, months, days, hours], us)| {
        format!("make_interval({years}, {months}, 0, {days}, {hours}, 0, {us} / 1000000.0)")
    });
    let mut columns = vec![
        ("int4", int()),
        ("float8", float()),
        ("float4", any::<f32>().prop_map(|number| quote(&float_literal(number.into()))).boxed()),
        ("numeric", "-?[0-9]{1,30}(\\.[0-9]{1,20})?(e-?[0-9]{1,2})?".prop_map(|digits| quote(&digits)).boxed()),
        ("text", text()),
        ("varchar(4)", text()),
        ("char(4)", text()),
        ("name", text()),
        ("bytea", bytes.boxed()),
        ("json", json()),
        ("jsonb", json()),
        ("raw_doc", json()),
        ("date", date()),
        ("timestamp", timestamptz()),
        ("timestamptz", timestamptz()),
        ("interval", interval.boxed()),
        ("mood", mood().boxed()),
        ("tstzrange", span().boxed()),
        (
            "text_range",
            (text(), text())
                .prop_map(|(a, b)| {
                    format!("text_range(least({a} collate \"C\", {b}), greatest({a} collate \"C\", {b}), '[]')")
                })
                .boxed(),
        ),
        ("uuid", any::<u128>().prop_map(|bits| format!("'{bits:032x}'")).boxed()),
        ("inet", (any::<std::net::IpAddr>(), 0..=32).prop_map(|(ip, bits)| format!("'{ip}/{bits}'")).boxed()),
        ("varbit", "[01]{0,20}".prop_map(|bits| quote(&bits)).boxed()),
        ("point", (any_float(), any_float()).prop_map(|(x, y)| format!("point('{x:e}', '{y:e}')")).boxed()),
        ("tsvector", text().prop_map(|text| format!("to_tsvector('simple', {text})")).boxed()),
        ("tsquery", text().prop_map(|text| format!("plainto_tsquery('simple', {text})")).boxed()),
        ("place", place()),
        ("known_place", place()),
        ("order_line", line()),
        ("alone", composite("alone", vec![text()])),
        ("order_line[]", array_of(line(), "order_line")),
        ("text[]", tags()),
        ("labels[]", array_of(tags().prop_map(|tags| format!("{tags}::labels")).boxed(), "labels")),
        ("float8[]", array_of(float(), "float8")),
        ("json[]", array_of(json(), "json")),
        ("timestamp[]", array_of(timestamptz(), "timestamp")),
        ("timestamptz[]", array_of(timestamptz(), "timestamptz")),
        ("text[]", matrix_of(text(), "text")),
        ("place[]", matrix_of(place(), "place")),
    ];
    if hstore {
        let pairs = || {
            vec((text(), nullable(text())), 0..4)
                .prop_map(|pairs| {
                    let (keys, values): (Vec<String>, Vec<String>) = pairs.into_iter().unzip();
                    format!("hstore(array[{}]::text[], array[{}]::text[])", keys.join(","), values.join(","))
                })
                .boxed()
        };
        columns.push(("hstore", pairs()));
        columns.push(("hstore[]", array_of(pairs(), "hstore")));
    }
    columns
}

/// Any text that Postgres takes, mostly of the characters that some output function or JSON treats apart.
fn text() -> impl Strategy<Value = String> {
    let special: Vec<char> =
        "\"\\{}()[],;:=> '\t\n\u{b}\u{c}\r\u{8}\u{1}\u{1f}\u{7f}\u{a0}\u{2028}/NULL".chars().collect();
    let any_char = any::<char>().prop_filter("Postgres has no NUL in text", |&char| char != '\0');
    vec(prop_oneof![3 => select(special), 1 => any_char, 1 => proptest::char::range('a', 'e')], 0..8)
        .prop_map(String::from_iter)
}

fn json() -> impl Strategy<Value = String> {
    let string = || text().prop_map(|text| serde_json::to_string(&text).unwrap());
    let number = "-?(0|[1-9][0-9]{0,20})(\\.[0-9]{1,5})?([eE][+-]?[0-9]{1,2})?";
    let leaf =
        prop_oneof![string(), number, select(&["null", "true", "false", " [ ] ", "{}"][..]).prop_map(str::to_owned)];
    leaf.prop_recursive(3, 12, 3, move |inner| {
        let object = vec((string(), inner.clone()), 1..4).prop_map(|fields| {
            let fields: Vec<String> = fields.iter().map(|(name, value)| format!("{name} :{value}")).collect();
            format!("{{{}}}", fields.join(", "))
        });
        prop_oneof![vec(inner, 1..4).prop_map(|items| format!("[{}]", items.join(" ,"))), object]
    })
}

fn any_float() -> impl Strategy<Value = f64> {
    use proptest::num::f64::{ANY, SUBNORMAL};
    prop_oneof![3 => ANY, 1 => SUBNORMAL, 3 => -1e6..1e6, 1 => (-1000..1000).prop_map(f64::from)]
}

fn float_literal(number: f64) -> String {
    format!("{number:e}")
}

/// From the beginning to the end of what a timestamp can say, mostly near 2000-01-01.
fn microseconds() -> impl Strategy<Value = i64> {
    prop_oneof![
        -210_000_000_000_000_000..9_000_000_000_000_000_000i64,
        -1_000_000_000_000_000..1_000_000_000_000_000i64
    ]
}

fn quote(text: impl AsRef<str>) -> String {
    format!("'{}'", text.as_ref().replace('\'', "''"))
}

fn nullable(expression: BoxedStrategy<String>) -> impl Strategy<Value = String> {
    prop_oneof![1 => Just("null".to_owned()), 5 => expression]
}

fn array_of(element: BoxedStrategy<String>, type_name: &'static str) -> BoxedStrategy<String> {
    let items = vec(nullable(element), 0..4);
    items.prop_map(move |items| format!("array[{}]::{type_name}[]", casts(&items, type_name))).boxed()
}

fn matrix_of(element: BoxedStrategy<String>, type_name: &'static str) -> BoxedStrategy<String> {
    let rows = (1..4usize).prop_flat_map(move |width| vec(vec(nullable(element.clone()), width), 1..4));
    rows.prop_map(move |rows| {
        let rows: Vec<String> = rows.iter().map(|row| format!("[{}]", casts(row, type_name))).collect();
        format!("array[{}]::{type_name}[]", rows.join(","))
    })
    .boxed()
}

fn casts(items: &[String], type_name: &str) -> String {
    items.iter().map(|item| format!("({item})::{type_name}")).collect::<Vec<_>>().join(",")
}

fn composite(type_name: &'static str, attributes: Vec<BoxedStrategy<String>>) -> BoxedStrategy<String> {
    let attributes: Vec<_> = attributes.into_iter().map(nullable).collect();
    attributes.prop_map(move |values| format!("row({})::{type_name}", values.join(","))).boxed()
}

#[test]
fn random_values_show_as_row_to_json_shows_them() {
    let oracle = Oracle::start();
    let (names, values): (Vec<&str>, Vec<_>) =
        columns(oracle.has("hstore", "create extension hstore")).into_iter().unzip();
    let types = oracle.types(&names);
    let row: Vec<_> = names
        .into_iter()
        .zip(values)
        .map(|(name, value)| nullable(value.prop_map(move |value| format!("({value})::{name}")).boxed()))
        .collect();

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
