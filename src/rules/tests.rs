//! Rules bound to small tables: the keys they make, and every message where they do not fit.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;
use std::sync::LazyLock;

use proptest::prelude::*;
use tokio_postgres::types::Type;

use super::bind::{BoundKey, BoundRule, BoundValue, FieldSource, JsonField, Rendered, Unbound, bind};
use super::form::KeyForm;
use super::ownership::check_overlaps;
use crate::batch::Form;
use crate::catalog::{Carrier, HiddenColumn, Leaf, Persistence, Published, TableFacts, TableKind, UniqueIndex};
use crate::config::diagnostic::{Diagnostic, render};
use crate::config::{Config, Rule, RulesFile, TableName, parse};
use crate::decode::types::Types;
use crate::model::{Column, Datum, Relation, ReplicaIdentity};

static TYPES: LazyLock<Types> = LazyLock::new(Types::builtin);

fn config(rules: &str) -> Config {
    let servers = "[postgres]\nurl = \"postgresql://db/shop\"\n[redis]\nurl = \"redis://cache\"\nprefix = \"shop:\"\n";
    let file = RulesFile { path: PathBuf::from("keepstep.toml"), text: format!("{servers}{rules}") };
    parse(file, &|_| None)
        .unwrap_or_else(|problems| panic!("{}", render(&problems.diagnostics, &problems.file, false)))
        .0
}

/// A table with these columns, the first of which is its primary key and replica identity.
fn table(name: &str, columns: &[(&str, Type)]) -> TableFacts {
    let name = TableName { schema: "public".to_owned(), name: name.to_owned() };
    let column = |(place, (name, ty)): (usize, &(&str, Type))| Column {
        name: (*name).to_owned(),
        type_oid: ty.oid(),
        type_modifier: -1,
        identity: place == 0,
    };
    let key = columns[0].0.to_owned();
    TableFacts {
        kind: TableKind::Ordinary,
        persistence: Persistence::Permanent,
        relation: Relation {
            oid: 16_384,
            schema: name.schema.clone(),
            name: name.name.clone(),
            identity: ReplicaIdentity::Default,
            columns: columns.iter().enumerate().map(column).collect(),
        },
        hidden: Vec::new(),
        unique: vec![unique(&format!("{}_pkey", name.name), &[&key], true)],
        identity_columns: vec![key],
        leaves: Vec::new(),
        published: Published::Directly,
        carrier: Carrier::Publication("keepstep".to_owned()),
        row_filter: None,
        row_security: false,
        name,
    }
}

fn unique(name: &str, columns: &[&str], not_null: bool) -> UniqueIndex {
    let columns = columns.iter().map(|column| (*column).to_owned()).collect();
    UniqueIndex { name: name.to_owned(), columns, not_null }
}

fn with_identity(mut table: TableFacts, identity: ReplicaIdentity, columns: &[&str]) -> TableFacts {
    table.relation.identity = identity;
    for column in &mut table.relation.columns {
        column.identity = columns.contains(&column.name.as_str());
    }
    table.identity_columns = columns.iter().map(|column| (*column).to_owned()).collect();
    table
}

const PRODUCT_COLUMNS: [&str; 6] = ["id", "sku", "name", "price", "category_id", "created_at"];

fn products() -> TableFacts {
    let types = [Type::INT8, Type::TEXT, Type::TEXT, Type::NUMERIC, Type::INT4, Type::TIMESTAMPTZ];
    let columns: Vec<_> = PRODUCT_COLUMNS.into_iter().zip(types).collect();
    let mut table = table("products", &columns);
    table.unique.push(unique("products_sku_key", &["sku"], false));
    table.unique.push(unique("products_category_id_name_key", &["category_id", "name"], true));
    table
}

/// The same with every old row logged whole.
fn full_products() -> TableFacts {
    with_identity(products(), ReplicaIdentity::Full, &PRODUCT_COLUMNS)
}

fn bound(rule: &Rule, table: &TableFacts) -> Result<BoundRule, Unbound> {
    bind(rule, 0, &table.relation, Some(table), &TYPES, "shop:")
}

/// The one rule of the file, bound.
fn bound_rule(rules: &str, table: &TableFacts) -> BoundRule {
    let config = config(rules);
    bound(&config.rules[0], table).unwrap_or_else(|unbound| {
        let shown: Vec<Diagnostic> = unbound.problems.iter().map(|p| p.diagnostic(&config.rules[0])).collect();
        panic!("{}", render(&shown, &config.file, false))
    })
}

fn delete_key(template: &str, table: &TableFacts) -> BoundKey {
    delete_key_with_vars(template, "{}", table)
}

fn delete_key_with_vars(template: &str, vars: &str, table: &TableFacts) -> BoundKey {
    let rule =
        format!("[rule.r]\ntable = \"public.{}\"\nvars = {vars}\ndelete = [\"{template}\"]\n", table.relation.name);
    bound_rule(&rule, table).delete.remove(0)
}

fn rendered(key: &BoundKey, row: &[Datum<'_>]) -> Result<String, Rendered> {
    let mut out = b"before".to_vec();
    let ended = key.render(row, &mut out);
    let text = String::from_utf8(out).unwrap();
    let added = text.strip_prefix("before").unwrap();
    match ended {
        Rendered::Done => Ok(added.to_owned()),
        ended => {
            assert_eq!(added, "", "nothing is left behind");
            Err(ended)
        }
    }
}

fn text(value: &str) -> Datum<'_> {
    Datum::Text(value.as_bytes())
}

#[test]
fn keys_are_rendered_from_rows() {
    let row =
        [text("17"), text("A/b"), Datum::Null, text("1.50"), Datum::UnchangedToast, text("2024-01-01 00:00:00+00")];
    let cases = [
        ("feed:global", Ok("shop:feed:global")),
        ("product:{id}", Ok("shop:product:17")),
        ("{{p:{id}}}:x", Ok("shop:{p:17}:x")),
        ("sku:{sku|lower}", Ok("shop:sku:a/b")),
        ("sku:{sku|urlencode}:{id}", Ok("shop:sku:A%2Fb:17")),
        ("sku:{sku|lower|urlencode|upper}", Ok("shop:sku:A%2FB")),
        ("sku:{sku|md5}", Ok("shop:sku:1a6a810497f82c44db3f9d5a91752c26")),
        ("name:{name}", Err(Rendered::Null)),
        ("name:{name?none}", Ok("shop:name:none")),
        ("name:{name?N ne|lower|urlencode}", Ok("shop:name:n%20ne")),
        ("name:{name?}", Ok("shop:name:")),
        ("category:{id}:{category_id}", Err(Rendered::Unknown)),
        ("category:{category_id?none}", Err(Rendered::Unknown)),
    ];
    for (template, expected) in cases {
        let found = rendered(&delete_key(template, &full_products()), &row);
        assert_eq!(found, expected.map(str::to_owned), "{template}");
    }
    // Never more columns than the row has.
    assert_eq!(rendered(&delete_key("product:{id}", &full_products()), &[]), Err(Rendered::Unknown));
}

#[test]
fn vars_stand_for_templates() {
    let vars = "{ url = \"https://shop/{category_id}/{sku}\", id = \"<{id}>\" }";
    let cases = [
        ("page:{url}", Ok("shop:page:https://shop/3/A b")),
        ("page:{url|urlencode}", Ok("shop:page:https%3A%2F%2Fshop%2F3%2FA%20b")),
        // A var goes before a column of the same name, except in vars.
        ("page:{id}", Ok("shop:page:<17>")),
    ];
    let row = [text("17"), text("A b"), Datum::Null, Datum::Null, text("3"), Datum::Null];
    for (template, expected) in cases {
        let key = delete_key_with_vars(template, vars, &full_products());
        assert_eq!(rendered(&key, &row), expected.map(str::to_owned), "{template}");
    }
    let null = [text("17"), Datum::Null, Datum::Null, Datum::Null, text("3"), Datum::Null];
    let key = delete_key_with_vars("page:{url}", vars, &full_products());
    assert_eq!(rendered(&key, &null), Err(Rendered::Null));
    let key = delete_key_with_vars("page:{url?none|upper}", vars, &full_products());
    assert_eq!(rendered(&key, &null), Ok("shop:page:NONE".to_owned()));
}

#[test]
fn a_form_is_stored_as_literals_and_types() {
    let stored = |template: &str| {
        let form = delete_key_with_vars(template, "{ page = \"/{sku}\" }", &full_products()).form;
        let stored = serde_json::to_string(&form).unwrap();
        assert_eq!(serde_json::from_str::<KeyForm>(&stored).unwrap(), form, "{stored}");
        stored
    };
    assert_eq!(stored("feed:{{é}}"), r#"[{"literal":"feed:{é}"}]"#);
    assert_eq!(stored("p:{id}"), r#"[{"literal":"p:"},{"value":{"source":{"column":20}}}]"#);
    assert_eq!(
        stored("p:{page?Home|lower|md5}"),
        r#"[{"literal":"p:"},{"value":{"source":{"var":[{"literal":"/"},{"value":{"source":{"column":25}}}]},"default":"Home","filters":["lower","md5"]}}]"#
    );
    for other in [r#"[{"glob":"*"}]"#, r#"[{"value":{"source":{"column":20},"more":1}}]"#] {
        assert!(serde_json::from_str::<KeyForm>(other).is_err(), "{other}");
    }
}

const WRITE: &str = "value = \"json\"\ncolumns = [\"id\"]\n";

/// Whether a rule with this key has a value of its own for each row.
fn is_own(key: &str) -> bool {
    let rule = format!(
        "[rule.r]\ntable = \"public.products\"\nvars = {{ page = \"/{{sku}}/{{id}}\" }}\nkey = \"{key}\"\n{WRITE}"
    );
    bound(&config(&rule).rules[0], &full_products()).is_ok()
}

#[test]
fn a_written_key_belongs_to_one_row() {
    let own = [
        "p:{id}",
        "p:{sku}",
        "p:{id}:{name}:{sku}",
        "p:{name}:{id}",
        "p:{category_id}:{name}",
        "p:{name|md5}{category_id}",
        "p:{sku|md5}",
        "p:{sku|urlencode|sha256}",
        "p:{name|urlencode}:{category_id}",
        "p:{page}",
        "p:{page|md5}",
        "p:{id}:{name?none|lower}",
    ];
    let shared = [
        "p:all",
        "p:{name}",
        "p:{category_id}",
        "p:{sku|lower}",
        "p:{sku?none}",
        "p:{id?0}",
        "p:{id}{category_id}",
        "p:{category_id}{name}",
        "p:{name}{category_id}",
        "p:{page|lower}",
        "p:{page?none}",
    ];
    for key in own {
        assert!(is_own(key), "{key}");
    }
    for key in shared {
        assert!(!is_own(key), "{key}");
    }
}

#[test]
fn an_old_key_renders_what_the_replica_identity_holds() {
    let by_index = with_identity(products(), ReplicaIdentity::Index, &["category_id", "name"]);
    let rule = "[rule.r]\ntable = \"public.products\"\non = [\"insert\", \"update\"]\ndelete = [\"p:{id}\", \"c:{category_id}\", \"all\"]\n";
    let in_identity = |table: &TableFacts| -> Vec<bool> {
        bound_rule(rule, table).delete.iter().map(|key| key.in_identity).collect()
    };
    assert_eq!(in_identity(&products()), [true, false, true]);
    assert_eq!(in_identity(&by_index), [false, true, true]);
    assert_eq!(in_identity(&full_products()), [true, true, true]);
}

#[test]
fn changed_counts_what_the_templates_use() {
    let rule = "[rule.r]\ntable = \"public.products\"\nchanged = [\"price\"]\nvars = { u = \"{sku}\" }\n\
                delete = [\"c:{category_id}\", \"u:{u}\"]\n";
    assert_eq!(bound_rule(rule, &full_products()).changed, Some(vec![1, 3, 4]));
    let rule = "[rule.r]\ntable = \"public.products\"\nkey = \"p:{id}\"\nvalue = \"json\"\ncolumns = [\"name\", \"price\"]\n\
                changed = [\"price\"]\n";
    assert_eq!(bound_rule(rule, &full_products()).changed, Some(vec![0, 3]));
    let rule = "[rule.r]\ntable = \"public.products\"\ndelete = [\"c:{category_id}\"]\n";
    assert_eq!(bound_rule(rule, &full_products()).changed, None);
}

#[test]
fn json_fields_are_named_and_escaped() {
    let rule = "[rule.r]\ntable = \"public.products\"\nkey = \"p:{id}\"\nvalue = \"json\"\ncolumns = [\"price\", \"id\"]\n\
                rename = { price = 'the \"price\"' }\nstrings = [\"price\"]\n";
    let fields = |rule: &str| match bound_rule(rule, &products()).write.unwrap().value {
        Some(BoundValue::Json(Form::String, fields)) => fields,
        other => panic!("{other:?}"),
    };
    let column = |field: &JsonField| match field.source {
        FieldSource::Column { place, as_string, .. } => (place, as_string),
        FieldSource::Computed(_) => panic!("{field:?}"),
    };
    let of_rule = fields(rule);
    let shown: Vec<_> =
        of_rule.iter().map(|field| (String::from_utf8_lossy(&field.lead), column(field).0, column(field).1)).collect();
    assert_eq!(shown, [(r#"{"the \"price\"":"#.into(), 3, true), (r#","id":"#.into(), 0, false)]);
    let all = rule.replace("[\"price\", \"id\"]", "[\"*\"]");
    assert_eq!(fields(&all).iter().map(|field| column(field).0).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_lost_value_column_leaves_the_keys() {
    let rule = "[rule.r]\ntable = \"public.products\"\nkey = \"p:{id}\"\nvalue = \"json\"\ncolumns = [\"id\", \"price\"]\n\
                changed = [\"price\"]\n";
    let config = config(rule);
    let without = |name: &str| {
        let mut table = products();
        table.relation.columns.retain(|column| column.name != name);
        let unbound = bind(&config.rules[0], 0, &table.relation, None, &TYPES, "shop:").unwrap_err();
        (unbound.problems.len(), unbound.fallback)
    };
    let (problems, fallback) = without("price");
    let fallback = fallback.unwrap();
    assert_eq!(problems, 2);
    assert!(fallback.write.is_some_and(|write| write.value.is_none()));
    assert_eq!(fallback.changed, None);
    let (_, fallback) = without("id");
    assert!(fallback.is_none());
}

/// What is said of each rule, bound to the table.
fn shown(table: &TableFacts, rules: &[&str]) -> String {
    let said = rules.iter().map(|rule| {
        let config = config(&format!("[rule.product]\ntable = \"public.{}\"\n{rule}", table.relation.name));
        let rule = &config.rules[0];
        let problems = bound(rule, table).map(|_| Vec::new()).unwrap_or_else(|unbound| unbound.problems);
        let diagnostics: Vec<Diagnostic> = problems.iter().map(|problem| problem.diagnostic(rule)).collect();
        render(&diagnostics, &config.file, false)
    });
    said.collect::<Vec<_>>().join("\n")
}

fn json_rule(key: &str) -> String {
    format!("key = \"{key}\"\nvalue = \"json\"\ncolumns = [\"id\", \"name\"]\n")
}

#[test]
fn unknown_columns() {
    let mut table = products();
    table.hidden.push(HiddenColumn { name: "weight".to_owned(), generated: false });
    table.hidden.push(HiddenColumn { name: "total".to_owned(), generated: true });
    table.row_filter = Some("(id > 10)".to_owned());
    insta::assert_snapshot!(shown(
        &table,
        &[
            "delete = [\"category:{categoryId}\", \"x:{nothing_like_it}\"]",
            "vars = { a = \"{ids}\", b = \"{a}{sku}\" }\ndelete = [\"v:{a}\", \"w:{b}\", \"w:{a|md5}\"]",
            "key = \"p:{id}\"\nvalue = \"json\"\ncolumns = [\"id\", \"nmae\", \"weight\", \"total\"]\nchanged = [\"prize\"]",
        ]
    ));
}

#[test]
fn old_rows_that_are_not_logged() {
    let orders = {
        let mut table = table("order_lines", &[("id", Type::INT8), ("order_id", Type::INT8), ("Line No", Type::INT4)]);
        table.unique.push(unique("order_lines_order_line", &["order_id", "Line No"], true));
        table
    };
    let no_key = with_identity(orders.clone(), ReplicaIdentity::Default, &[]);
    let nothing = with_identity(products(), ReplicaIdentity::Nothing, &[]);
    let mut hidden = products();
    hidden.relation.columns.remove(0);
    let mut generated = hidden.clone();
    generated.hidden.push(HiddenColumn { name: "id".to_owned(), generated: true });
    let reports = [
        shown(&orders, &["delete = [\"order:{order_id}:lines\"]"]),
        shown(&orders, &["on = [\"update\", \"delete\"]\ndelete = [\"order:{order_id}:{Line No}:{id}\"]"]),
        shown(&products(), &["on = [\"delete\"]\ndelete = [\"old:{sku}:{name|md5}\"]"]),
        shown(&no_key, &["delete = [\"order:{order_id}:lines\"]"]),
        shown(&nothing, &["on = [\"insert\", \"update\"]\ndelete = [\"sku:{sku}\"]"]),
        shown(&hidden, &["delete = [\"all\"]"]),
        shown(&generated, &["delete = [\"all\"]"]),
    ];
    insta::assert_snapshot!(reports.join("\n"));
    // What a rule does not follow, it does not need.
    assert_eq!(shown(&nothing, &["on = [\"insert\"]\ndelete = [\"sku:{sku}\"]"]), "");
    assert_eq!(shown(&products(), &["on = [\"insert\", \"update\"]\ndelete = [\"sku:{sku}\"]"]), "");
}

#[test]
fn tags_of_rows_that_are_not_logged() {
    let tagged = "write = \"present\"\ntags = [\"cat:{category_id}\", \"id:{id}\"]\n";
    insta::assert_snapshot!(shown(
        &products(),
        &[&(json_rule("p:{id}") + tagged), "delete_tags = [\"cat:{category_id}\", \"colour:{colour}\"]"]
    ));
}

#[test]
fn partitions_that_log_less() {
    let leaf = |name: &str, identity, columns: &[&str]| Leaf {
        oid: 0,
        name: TableName { schema: "public".to_owned(), name: name.to_owned() },
        identity,
        identity_columns: columns.iter().map(|column| (*column).to_owned()).collect(),
    };
    let mut root = full_products();
    root.kind = TableKind::Partitioned;
    root.leaves = vec![
        leaf("products_2023", ReplicaIdentity::Full, &PRODUCT_COLUMNS),
        leaf("products_2024", ReplicaIdentity::Default, &["id"]),
        leaf("Products 2025", ReplicaIdentity::Default, &["id"]),
    ];
    let mut many = root.clone();
    many.leaves = (0..30).map(|number| leaf(&format!("part_{number}"), ReplicaIdentity::Nothing, &[])).collect();
    let mut by_key = products();
    by_key.kind = TableKind::Partitioned;
    by_key.leaves = vec![
        leaf("products_2023", ReplicaIdentity::Full, &PRODUCT_COLUMNS),
        leaf("products_2024", ReplicaIdentity::Default, &["id"]),
        leaf("products_2025", ReplicaIdentity::Nothing, &[]),
    ];
    let rule = ["delete = [\"all\"]"];
    let needing = ["delete = [\"sku:{sku}\"]"];
    insta::assert_snapshot!(
        [shown(&root, &rule), shown(&many, &rule), shown(&by_key, &rule), shown(&by_key, &needing)].join("\n")
    );
}

#[test]
fn keys_that_rows_share() {
    let mut without_index = full_products();
    without_index.unique.clear();
    let keys = [
        "p:{category_id}",
        "p:{name}",
        "p:all",
        "p:{sku|lower}",
        "p:{sku|md5|upper}",
        "p:{id?0}",
        "p:{category_id}:{name}{price}",
        "p:{sku}:{name}",
        "p:{id}{category_id}",
    ];
    let mut reports: Vec<String> = keys.iter().map(|key| shown(&full_products(), &[&json_rule(key)])).collect();
    reports.push(shown(&without_index, &[&json_rule("p:{category_id}:{name}")]));
    insta::assert_snapshot!(reports.join("\n"));
}

#[test]
fn keys_that_results_share() {
    let report = |key: &str, params: &str| {
        let config = config(&format!(
            "[query.page]\nkey = \"{key}\"\nmode = \"refresh\"\nsql = \"select :a || :b\"\nshape = \"value\"\n\
             [[query.page.on]]\ntable = \"public.products\"\n{params}\n"
        ));
        let problems =
            bound(&config.rules[0], &full_products()).err().map_or_else(Vec::new, |unbound| unbound.problems);
        let shown: Vec<Diagnostic> = problems.iter().map(|problem| problem.diagnostic(&config.rules[0])).collect();
        render(&shown, &config.file, false)
    };
    const TEXTS: &str = "params = { a = \"{sku}\", b = \"{name}\" }";
    for (key, params) in [
        ("page:{a|urlencode}:{b}", TEXTS),
        ("page:{a|md5}:{b}", TEXTS),
        ("page:{a}:{b}", "params = { a = \"{id}\", b = \"{sku}:{name}\" }"),
        ("page:{a}:{b}", "params = { a = \"{sku}\" }\nlookup = \"select 'b' as b\""),
    ] {
        assert_eq!(report(key, params), "", "{key} {params}");
    }
    insta::assert_snapshot!(
        [report("page:{a}:{b}", TEXTS), report("page:{a|sha256}{b}{a}", "params = { a = \"{id}\", b = \"{sku}\" }")]
            .join("\n")
    );
}

#[test]
fn keys_of_keepstep_and_fields_named_twice() {
    insta::assert_snapshot!(shown(
        &full_products(),
        &[
            "delete = [\"k{sku}\", \"k:{sku}\", \"k{id}\"]",
            "delete_match = [\"*\", \"k*:{id}\", \"list:*\"]",
            "key = \"p:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\nrename = { sku = \"name\" }",
        ]
    ));
}

#[test]
fn keys_that_rules_fight_for() {
    let write = |name: &str, key: &str| format!("[rule.{name}]\ntable = \"public.products\"\nkey = \"{key}\"\n{WRITE}");
    let delete = |name: &str, key: &str| format!("[rule.{name}]\ntable = \"public.products\"\ndelete = [\"{key}\"]\n");
    let of = |name: &str, lines: &str| format!("[rule.{name}]\ntable = \"public.products\"\n{lines}\n");
    let report = |rules: &[String]| {
        let config = config(&rules.concat());
        let bound: Vec<BoundRule> = config.rules.iter().map(|rule| bound(rule, &full_products()).unwrap()).collect();
        let pairs: Vec<(&Rule, &BoundRule)> = config.rules.iter().zip(&bound).collect();
        render(&check_overlaps(&pairs), &config.file, false)
    };
    let reports = [
        report(&[write("by-id", "product:{id}"), write("by-sku", "product:{sku}")]),
        report(&[write("product", "product:{id}"), delete("lists", "product:{name}:list")]),
        report(&[write("by-sku", "product:{sku}"), delete("lists", "product:{id}:list")]),
        report(&[write("product", "product:{id}") + "delete = [\"product:{category_id}\"]\n"]),
        report(&[write("product", "product:{id}"), of("lists", "delete_match = [\"product:{category_id}*\"]")]),
        report(&[of("gens", "bump = [\"gen:{id}\"]"), of("lists", "delete_match = [\"gen:*\"]\ndelete = [\"gen:7\"]")]),
        report(&[write("product", "product:{id}") + "bump = [\"product:{id}\"]\nstream = { key = \"product:1\" }\n"]),
    ];
    insta::assert_snapshot!(reports.join("\n"));
    let tagged = "write = \"present\"\ntags = [\"{category_id}\"]\n".replace("[\"", "[\"cat:");
    let reports = [
        report(&[write("product", "product:{id}") + &tagged, delete("all", "tag:cat:{id}")]),
        report(&[write("product", "product:{id}") + &tagged, write("set", "tag:{sku}")]),
        report(&[write("set", "tag:cat:{id}"), of("stale", "delete_tags = [\"cat:{id}\"]")]),
    ];
    insta::assert_snapshot!("tags_that_rules_fight_for", reports.join("\n"));
    // The one that has to be looked up is bound behind the other.
    let lookup = "lookup = \"select code as dept from departments where id = :category_id\"\n";
    let templates = "bump = [\"gen:{dept}\", \"product:{id}\"]\ndelete_match = [\"page:{dept}:*\", \"product:{id}*\"]\n\
                     delete_tags = [\"dept:{dept}\", \"cat:{id}\"]";
    let mixed = report(&[
        write("product", "product:{id}"),
        of("told", &(lookup.to_owned() + templates)),
        write("set", "tag:cat:{id}"),
    ]);
    insta::assert_snapshot!("templates_with_and_without_a_lookup", mixed);
    let apart = [
        write("by-id", "product:{id}"),
        write("cart", "product:{id}:cart"),
        write("by-sku", "product:sku:{sku|urlencode}"),
        delete("a", "list:{name}"),
        delete("b", "list:{sku}:{name}"),
        of("matching", "delete_match = [\"list:*\", \"page:*:{id}\"]"),
        of("told", "bump = [\"gen:{id}\"]\nstream = { key = \"events\" }"),
        write("tagged", "tagged:{id}") + &tagged,
        write("tagged-too", "tagged-too:{id}") + &tagged,
        of("stale", "delete_tags = [\"cat:{id}\"]"),
        of("told-too", "bump = [\"gen:{id}\"]\nstream = { key = \"events\" }"),
    ];
    assert_eq!(report(&apart), "");
}

#[test]
fn no_tag_takes_a_key_that_a_query_fills() {
    let query = "[query.page]\nkey = \"page:{category}\"\nmode = \"refresh\"\nshape = \"value\"\nsql = \"select 1 where 1 = :category\"\n\
                 [[query.page.on]]\ntable = \"public.products\"\nparams = { category = \"{category_id}\" }\n";
    let kept = |rules: &str, key: &str| {
        let tagging = bound_rule(rules, &full_products()).tagging();
        tagging.kept.iter().any(|kept| kept.matches(key.as_bytes()))
    };
    assert!(kept(query, "shop:page:7"));
    let deleted =
        query.replace("refresh", "delete").replace("shape = \"value\"\nsql = \"select 1 where 1 = :category\"\n", "");
    assert!(!kept(&deleted, "shop:page:7"));
}

/// A column's value in text form, for each column of `products`.
fn any_row() -> impl Strategy<Value = [Option<String>; 6]> {
    let text = || prop::option::weighted(0.9, ".{0,6}");
    (
        any::<i64>().prop_map(|id| Some(id.to_string())),
        text(),
        text(),
        prop::option::of("-?[0-9]{1,4}(\\.[0-9]{1,3})?|NaN|-?Infinity"),
        any::<i32>().prop_map(|category| Some(category.to_string())),
        prop::option::of(
            "[1-9][0-9]{3}-[01][0-9]-[0-3][0-9] [0-2][0-9]:[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?\\+00( BC)?",
        ),
    )
        .prop_map(|(id, sku, name, price, category, at)| [id, sku, name, price, category, at])
}

/// A template over `products`, and the vars of [`VARS`].
fn any_template() -> impl Strategy<Value = String> {
    let names = prop::sample::select([PRODUCT_COLUMNS.as_slice(), &["page", "both"]].concat());
    let filters = prop::sample::subsequence(vec!["|lower", "|upper", "|urlencode", "|md5", "|sha256"], 0..3);
    let default = prop::sample::select(vec!["", "?", "?None", "?ÀΣ:"]);
    let placeholder = (names, default, filters.prop_shuffle())
        .prop_map(|(name, default, filters)| format!("{{{name}{default}{}}}", filters.concat()));
    let literal = prop::sample::select(vec!["", ":", "-", "é", "{{", "}}:"]);
    prop::collection::vec((placeholder, literal), 1..4).prop_map(|parts| {
        let parts: String = parts.into_iter().map(|(placeholder, literal)| placeholder + literal).collect();
        format!("k:{parts}")
    })
}

const VARS: &str = "{ page = \"É/{sku}/{id}\", both = \"{name?-}{category_id}\" }";

fn datums(row: &[Option<String>; 6]) -> [Datum<'_>; 6] {
    row.each_ref().map(|value| value.as_deref().map_or(Datum::Null, text))
}

proptest! {
    #[test]
    fn a_rendered_key_matches_its_pattern(template in any_template(), row in any_row()) {
        let key = delete_key_with_vars(&template, VARS, &full_products());
        if let Ok(rendered) = rendered(&key, &datums(&row)) {
            prop_assert!(key.pattern.matches(rendered.as_bytes()), "{rendered}");
            prop_assert!(rendered.as_bytes().starts_with(key.pattern.literal_prefix()));
            let stored = serde_json::to_string(&key.form).unwrap();
            let form: KeyForm = serde_json::from_str(&stored).unwrap();
            let elsewhere = format!("other:{}", rendered.strip_prefix("shop:").unwrap());
            prop_assert!(form.pattern("other:").matches(elsewhere.as_bytes()), "{elsewhere} {stored}");
            prop_assert!(key.pattern.under(b"other:").matches(elsewhere.as_bytes()), "{elsewhere}");
        }
    }

    #[test]
    fn a_key_accepted_as_unique_never_serves_two_rows(template in any_template(), one in any_row(), other in any_row()) {
        let rule = format!("[rule.r]\ntable = \"public.products\"\nvars = {VARS}\nkey = \"{template}\"\n{WRITE}");
        let config = config(&rule);
        let Ok(bound) = bound(&config.rules[0], &full_products()) else { return Ok(()) };
        let key = bound.write.unwrap().key;
        // Rows that agree in nothing unique, but in as much of the rest as possible.
        let alike = [other[0].clone(), other[1].clone(), other[2].clone(), one[3].clone(), one[4].clone(), one[5].clone()];
        for other in [other, alike] {
            let differ = one[0] != other[0] && one[1] != other[1] && (one[2] != other[2] || one[4] != other[4]);
            if let (true, Ok(first), Ok(second)) = (differ, rendered(&key, &datums(&one)), rendered(&key, &datums(&other))) {
                prop_assert_ne!(first, second);
            }
        }
    }
}
