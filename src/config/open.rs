//! Rules that say of which tables they are, and not of which table: a pattern for its name, or templates that name it.
//!
//! Which tables there are is the catalog's to say, and they come and go while a daemon runs. So such a rule stays apart as
//! it was written, and [`Config::with_tables`] makes ordinary rules of it, one for each table. In these the schema and the
//! table are literals of the templates: what keys look like, whose they are and whether two rules share any is known of
//! each table as exactly as if its rule had been written out, and nothing behind the configuration knows of patterns.

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::rule::fingerprint;
use super::{Config, Rule, Settled, Spanned, TableName, Value, WriteAction};
use crate::rules::template::{self, Part, Placeholder, Template};

/// Stands for any text in a table's name.
pub const ANY: char = '*';

/// A rule as the file gives it, of tables that are not known yet.
#[derive(Clone, Debug)]
pub struct OpenRule {
    /// Its table is a pattern, or a name.
    rule: Rule,
}

/// A table that there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: TableName,
    /// The columns of its primary key, in order; none where it has no primary key, or where that is not known.
    pub primary_key: Vec<String>,
}

/// The rule of the file that a rule of this name was made of, if its table is one of several.
pub fn pattern_of(rule: &str) -> Option<&str> {
    // No rule of the file has a bracket in its name.
    rule.split_once('[').map(|(open, _)| open)
}

/// Whether a rule of this name is meant by the name that somebody has given: its own, or that of the file.
pub fn is_meant(rule: &str, given: &str) -> bool {
    rule == given || pattern_of(rule) == Some(given)
}

impl Config {
    /// The rules for these tables: what was made for others before is left out.
    pub fn with_tables(&self, tables: &[Table]) -> Config {
        let is_open = |rule: &Rule| {
            let name = rule.name.value.as_str();
            self.open.iter().any(|open| open.name() == pattern_of(name).unwrap_or(name))
        };
        let mut rules: Vec<Rule> = self.rules.iter().filter(|rule| !is_open(rule)).cloned().collect();
        rules.extend(self.open.iter().flat_map(|open| open.rules(tables)));
        Config { rules, tables: Some(tables.to_vec()), ..self.clone() }
    }

    /// Those whose pattern no table matches.
    pub fn idle(&self) -> impl Iterator<Item = &OpenRule> {
        let made = |open: &OpenRule| self.rules.iter().any(|rule| is_meant(&rule.name.value, open.name()));
        self.open.iter().filter(move |open| !made(open))
    }
}

impl OpenRule {
    /// Whether the rule is one of these.
    pub(super) fn is_open(rule: &mut Rule) -> bool {
        is_pattern(&rule.table.value)
            || templates(rule).iter().any(|template| template.value.placeholders().any(of_table))
    }

    /// Takes the rule for one.
    pub(super) fn new(rule: Rule) -> Self {
        OpenRule { rule }
    }

    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.rule.name.value
    }

    /// The table's name, or the pattern for it.
    pub fn table(&self) -> &Spanned<TableName> {
        &self.rule.table
    }

    /// Whether it writes keys.
    pub fn writes(&self) -> bool {
        self.rule.write.is_some()
    }

    /// What is wrong with it, whatever tables there are.
    pub(super) fn problems(&self) -> Vec<Diagnostic> {
        let vars = self.rule.vars.iter().filter(|(name, _)| template::OF_TABLE.contains(&name.value.as_str()));
        let taken = vars.map(|(name, _)| {
            let title = format!("rule `{}` has a var `{}`, which stands for its table", self.name(), name.value);
            let found = Diagnostic::error(Code::TableVar, title, name.span.clone(), "has a meaning already");
            found.help("give it another name")
        });
        taken.chain(self.shared_key()).collect()
    }

    /// Rows of two tables must not come to the same key, not even once there are two tables.
    fn shared_key(&self) -> Option<Diagnostic> {
        let (key, table) = (&self.rule.write.as_ref()?.key, &self.rule.table);
        let of_var = |name: &str| self.rule.vars.iter().find(|(var, _)| var.value == name).map(|(_, text)| &text.value);
        let names = |wanted: &str| {
            let is = |placeholder: &Placeholder| placeholder.name == wanted;
            let through = |part: &Placeholder| of_var(&part.name).is_some_and(|var| var.placeholders().any(is));
            key.value.placeholders().any(|part| is(part) || through(part))
        };
        let parts = [(template::SCHEMA, &table.value.schema), (template::TABLE, &table.value.name)];
        let missing = parts.into_iter().filter(|(name, part)| part.contains(ANY) && !names(name));
        let missing: Vec<String> = missing.map(|(name, _)| format!("{{{name}}}")).collect();
        if missing.is_empty() {
            return None;
        }
        let title = format!("rule `{}` would write the same keys for different tables", self.name());
        let label = format!("does not hold {}", missing.join(" and "));
        let found = Diagnostic::error(Code::KeyOfTables, title, key.span.clone(), label);
        let found = found.context(table.span.clone(), "can match several tables");
        Some(found.help(format!("put it into the key:  key = \"{}:{}\"", missing.join(":"), key.value.text())))
    }

    /// A rule for each of the tables that it is about. One that names its table is there without it too, so that it is said
    /// that there is no such table.
    fn rules(&self, tables: &[Table]) -> Vec<Rule> {
        let wanted = &self.rule.table.value;
        if is_pattern(wanted) {
            return tables.iter().filter(|table| is_match(wanted, &table.name)).map(|table| self.rule(table)).collect();
        }
        let unknown = Table { name: wanted.clone(), primary_key: Vec::new() };
        vec![self.rule(tables.iter().find(|table| table.name == *wanted).unwrap_or(&unknown))]
    }

    fn rule(&self, table: &Table) -> Rule {
        let mut rule = self.rule.clone();
        if is_pattern(&rule.table.value) {
            rule.name.value = format!("{}[{}]", self.name(), table.name.written());
        }
        rule.table.value = table.name.clone();
        // In a var too: the text of a template, which is what a rule is known again by, does not say what stands for it.
        let uses_key = |template: &&mut Spanned<Template>| template.value.placeholders().any(is_primary_key);
        let uses_key = templates(&mut rule).iter().any(uses_key);
        for (_, var) in &mut rule.vars {
            // A var is made of columns only.
            var.value = var.value.with(|part| named(part, &table.name).or_else(|| key_columns(part, table)));
        }
        if !table.primary_key.is_empty() && uses_key {
            let name = Spanned { value: template::PRIMARY_KEY.to_owned(), span: rule.table.span.clone() };
            let columns = Template::of_columns(&table.primary_key);
            rule.vars.push((name, Spanned { value: columns, span: rule.table.span.clone() }));
        }
        for template in templates(&mut rule) {
            template.value = template.value.with(|part| named(part, &table.name));
        }
        rule.fingerprint = fingerprint(&rule);
        rule
    }
}

/// What stands for the table's name.
fn named(placeholder: &Placeholder, table: &TableName) -> Option<Vec<Part>> {
    let text = match placeholder.name.as_str() {
        template::SCHEMA => &table.schema,
        template::TABLE => &table.name,
        _ => return None,
    };
    Some(vec![Part::Literal(placeholder.filtered(text))])
}

/// What stands for the primary key inside of a var; `None` where that would take a var of its own.
fn key_columns(placeholder: &Placeholder, table: &Table) -> Option<Vec<Part>> {
    let is_plain = placeholder.filters.is_empty() && placeholder.default.is_none();
    match table.primary_key.as_slice() {
        _ if !is_primary_key(placeholder) => None,
        [column] => Some(vec![Part::Placeholder(Placeholder { name: column.clone(), ..placeholder.clone() })]),
        columns if is_plain && !columns.is_empty() => Some(Template::of_columns(columns).parts().to_vec()),
        _ => None,
    }
}

fn is_primary_key(placeholder: &Placeholder) -> bool {
    placeholder.name == template::PRIMARY_KEY
}

fn of_table(placeholder: &Placeholder) -> bool {
    template::OF_TABLE.contains(&placeholder.name.as_str())
}

/// Every template of a rule, its vars among them. All fields are named, so that a new one is thought of here.
fn templates(rule: &mut Rule) -> Vec<&mut Spanned<Template>> {
    let Rule {
        vars,
        write,
        delete,
        settled,
        name: _,
        table: _,
        on: _,
        on_given: _,
        names_are_given: _,
        when: _,
        redelete: _,
        lookup: _,
        refresh: _,
        lists: _,
        rows_max: _,
        changed: _,
        fingerprint: _,
    } = rule;
    let Settled { delete_match, delete_tags, bump, stream, publish } = settled;
    let mut all: Vec<_> = vars.iter_mut().map(|(_, var)| var).collect();
    all.extend(delete.iter_mut().chain(delete_match).chain(delete_tags).chain(bump).chain(publish));
    all.extend(stream.as_mut().map(|stream| &mut stream.key));
    if let Some(write) = write {
        let WriteAction {
            key,
            value,
            tags,
            life: _,
            present_only: _,
            keep_on_delete: _,
            owns: _,
            warm: _,
            every: _,
            audit: _,
        } = write;
        all.push(key);
        all.extend(tags);
        match value {
            Value::Row(_) => {}
            Value::Text(text) => all.push(text),
            Value::Member { member, .. } => all.push(member),
        }
    }
    all
}

fn is_pattern(table: &TableName) -> bool {
    table.schema.contains(ANY) || table.name.contains(ANY)
}

fn is_match(pattern: &TableName, table: &TableName) -> bool {
    glob(&pattern.schema, &table.schema) && glob(&pattern.name, &table.name)
}

/// Whether the text is the pattern with any text in place of each `*`.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once(ANY) else { return pattern == text };
    let Some(mut text) = text.strip_prefix(first) else { return false };
    let (middle, last) = rest.rsplit_once(ANY).map_or(("", rest), |(middle, last)| (middle, last));
    for part in middle.split(ANY) {
        // The earliest place leaves the most for the rest.
        let Some(at) = text.find(part) else { return false };
        text = &text[at + part.len()..];
    }
    text.ends_with(last)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::config::{RulesFile, parse};

    fn config(rules: &str) -> Config {
        let text = format!("[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\n{rules}");
        parse(RulesFile { path: "keepstep.toml".into(), text }, &|_| None).unwrap().0
    }

    fn table(schema: &str, name: &str, primary_key: &[&str]) -> Table {
        let primary_key = primary_key.iter().map(|column| (*column).to_owned()).collect();
        Table { name: TableName { schema: schema.into(), name: name.into() }, primary_key }
    }

    /// The rules, each with its table and its templates.
    fn shown(config: &Config) -> Vec<String> {
        let one = |rule: &Rule| {
            let mut rule = rule.clone();
            let texts: Vec<String> = templates(&mut rule).iter().map(|template| written(&template.value)).collect();
            format!("{} {}: {}", rule.name.value, rule.table.value, texts.join(" "))
        };
        config.rules.iter().map(one).collect()
    }

    fn written(template: &Template) -> String {
        let one = |part: &Part| match part {
            Part::Literal(text) => text.clone(),
            Part::Placeholder(part) => format!("{{{}}}", part.name),
        };
        template.parts().iter().map(one).collect()
    }

    const PRODUCT: &str = "[rule.product]\ntable = \"tenant_*.products\"\nkey = \"{_schema}:{_table}:{_pk}\"\nvalue = \"json\"\n\
                           columns = [\"*\"]\n";

    #[test]
    fn a_star_stands_for_any_text() {
        let cases = [
            ("tenant_*", "tenant_a", true),
            ("tenant_*", "tenant_", true),
            ("tenant_*", "Tenant_a", false),
            ("tenant_*", "a_tenant_a", false),
            ("*", "", true),
            ("*_x", "x_x_x", true),
            ("a*b*c", "abbc", true),
            ("a*b*c", "acb", false),
            ("a*ba", "aba", true),
            ("a*a", "a", false),
            ("a**a", "aa", true),
            ("a*é*b", "aéb", true),
            ("exact", "exact", true),
            ("exact", "exactly", false),
        ];
        for (pattern, text, expected) in cases {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_rule_is_made_for_each_table_and_names_it() {
        let config = config(&format!("[rule.feed]\ntable = \"public.news\"\ndelete = [\"feed\"]\n{PRODUCT}"));
        assert_eq!(shown(&config), ["feed public.news: feed"]);
        let tables = [
            table("tenant_a", "products", &["id"]),
            table("tenant_b", "products", &["org", "id"]),
            table("tenant_b", "orders", &["id"]),
            table("tenant_\"c.d\"", "products", &[]),
        ];
        let matched = config.with_tables(&tables);
        assert_eq!(
            shown(&matched),
            [
                "feed public.news: feed",
                "product[tenant_a.products] tenant_a.products: {id} tenant_a:products:{_pk}",
                "product[tenant_b.products] tenant_b.products: {org}:{id} tenant_b:products:{_pk}",
                // Without a primary key the name means nothing, and binding says so.
                "product[\"tenant_\"\"c.d\"\"\".products] tenant_\"c.d\".products: tenant_\"c.d\":products:{_pk}",
            ]
        );
        assert_eq!(config.idle().count(), 1);
        assert_eq!(matched.idle().count(), 0);
        // What was made before gives way; the same tables give the same rules.
        let fingerprints =
            |config: &Config| config.rules.iter().map(|rule| rule.fingerprint.clone()).collect::<Vec<_>>();
        assert_eq!(fingerprints(&matched.with_tables(&tables)), fingerprints(&matched));
        assert_eq!(shown(&matched.with_tables(&[])), ["feed public.news: feed"]);
        let other_key = matched.with_tables(&[table("tenant_a", "products", &["sku"])]);
        assert_ne!(fingerprints(&other_key)[1], fingerprints(&matched)[1], "its keys are others");
        let in_var = PRODUCT.replace("{_pk}", "{u}") + "vars = { u = \"{_pk|md5}\" }\n";
        let of_key = |column| self::config(&in_var).with_tables(&[table("tenant_a", "products", &[column])]);
        assert_ne!(fingerprints(&of_key("id")), fingerprints(&of_key("sku")), "in a var, too");
    }

    #[test]
    fn every_template_can_name_the_table() {
        let text = "[rule.all]\ntable = \"*.*\"\nvars = { url = \"/{_schema|upper}/{_table}/{_pk|md5}\" }\n\
                    key = \"{_schema|md5}:{_table}:{_pk|md5}\"\nvalue = \"zset\"\nmember = \"{_pk}\"\nscore = \"1\"\n\
                    delete = [\"d:{_schema}:{url}\"]\ndelete_match = [\"m:{_schema}:*\"]\nbump = [\"b:{_table}\"]\n\
                    stream = { key = \"s:{_schema}\" }\npublish = { channel = \"p:{_table}\" }\n";
        let matched = config(text).with_tables(&[table("s", "t", &["id"])]);
        let md5 = "03c7c0ace395d80182db07ae2c30f034";
        let expected =
            format!("all[s.t] s.t: /S/t/{{id}} {{id}} d:s:{{url}} m:s:* b:t p:t s:s {md5}:t:{{_pk}} {{_pk}}");
        assert_eq!(shown(&matched), [expected]);
        let literals = |template: &Template| {
            template.parts().windows(2).any(|pair| matches!(pair, [Part::Literal(_), Part::Literal(_)]))
        };
        let mut rule = matched.rules[0].clone();
        assert!(!templates(&mut rule).iter().any(|template| literals(&template.value)), "next to each other");
    }

    #[test]
    fn a_rule_of_one_table_keeps_its_name() {
        let config = config("[rule.a]\ntable = \"public.a\"\ndelete = [\"a:{_table}:{_pk}\"]\n");
        assert!(config.rules.is_empty() && config.tables.is_none());
        assert_eq!(shown(&config.with_tables(&[])), ["a public.a: a:a:{_pk}"], "there is no such table, which is said");
        let there = config.with_tables(&[table("public", "a", &["x", "y"])]);
        assert_eq!(shown(&there), ["a public.a: {x}:{y} a:a:{_pk}"]);
        assert_eq!(there.with_tables(&[]).rules.len(), 1);
    }

    #[test]
    fn a_name_means_the_rules_that_were_made_of_it() {
        let cases = [
            ("product", "product", true),
            ("product[a.b]", "product", true),
            ("product[a.b]", "product[a.b]", true),
            ("product[a.b]", "prod", false),
            ("product", "product[a.b]", false),
        ];
        for (rule, given, expected) in cases {
            assert_eq!(is_meant(rule, given), expected, "{rule} {given}");
        }
    }
}
