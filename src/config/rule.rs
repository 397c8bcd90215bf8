//! `[defaults]` and `[rule.NAME]`: what a rule says for itself, and whether its fields agree with each other.

use std::collections::HashSet;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::fields::Table;
use super::mistake::Mistake;
use super::open::ANY;
use super::quantity;
use super::section::{Either, Section, expression, template};
use super::{
    ColumnSelection, Life, Lifetime, Operations, Redelete, RowForm, RowValue, Rule, Settled, Spanned, StreamAction,
    TableName, Value, WriteAction,
};
use crate::rules::expression::Expression;
use crate::rules::sql::Sql;
use crate::rules::template::Template;

/// How many rows of a lookup's result name keys, if nothing else is said.
pub(super) const ROWS_MAX: usize = 1000;

/// `[defaults]`, and the same fields of a rule: `None` is not given.
#[derive(Clone, Debug, Default)]
pub(super) struct Defaults {
    /// `Some(None)` is `"off"`.
    ttl: Option<Spanned<Option<Lifetime>>>,
    jitter: Option<Spanned<f64>>,
    present_only: Option<bool>,
    keep_on_delete: Option<Spanned<bool>>,
    warm: Option<bool>,
    audit: Option<Option<f64>>,
    /// `Some(None)` is `"off"`.
    every: Option<Spanned<Option<Duration>>>,
}

/// Reads `[defaults]`.
pub(super) fn defaults(mut section: Section<'_, '_>) -> Defaults {
    let defaults = Defaults::read(&mut section);
    section.finish();
    defaults
}

impl Defaults {
    fn read(section: &mut Section<'_, '_>) -> Self {
        Defaults {
            ttl: section.lifetime("ttl"),
            jitter: section.parsed("jitter", quantity::share),
            present_only: section.choice("write").map(|choice| choice.value == "present"),
            keep_on_delete: section
                .choice("on_delete")
                .map(|choice| Spanned { value: choice.value == "keep", span: choice.span }),
            warm: section.flag("warm"),
            audit: section.parsed("audit", quantity::share_per_minute).map(|share| share.value),
            every: section.duration_or_off("every"),
        }
    }

    /// These where they are given, else `others`.
    fn or(self, others: &Defaults) -> Self {
        Defaults {
            ttl: self.ttl.or_else(|| others.ttl.clone()),
            jitter: self.jitter.or_else(|| others.jitter.clone()),
            present_only: self.present_only.or(others.present_only),
            keep_on_delete: self.keep_on_delete.or_else(|| others.keep_on_delete.clone()),
            warm: self.warm.or(others.warm),
            audit: self.audit.or(others.audit),
            every: self.every.or_else(|| others.every.clone()),
        }
    }
}

/// Reads a rule; `None` if what it needs is missing or wrong.
pub(super) fn rule(mut section: Section<'_, '_>, name: Spanned<String>, defaults: &Defaults) -> Option<Rule> {
    let table = section.parsed("table", table_name);
    let operations = operations(&mut section, "on");
    let vars = section.pairs("vars", |text| template(text, Template::parse_free));
    let when = section.parsed("when", expression);
    let key = section.parsed("key", |text| template(text, Template::parse));
    let write = write_action(&mut section, key, defaults);
    let delete = templates(&mut section, "delete");
    let settled = settled(&mut section);
    let lookup = lookup(&mut section);
    let redelete = redelete(&mut section);
    let changed = section.columns("changed").map(|columns| columns.value);
    check_purpose(&mut section);
    check_changed(&mut section, operations);
    let on_given = section.given("on").is_some();
    if section.is_sound() {
        check_vars(&mut section, &vars, write.as_ref(), &delete, &settled);
    }
    section.finish();
    let mut rule = Rule {
        name,
        table: table?,
        on: operations,
        on_given,
        vars,
        names_are_given: false,
        when,
        write,
        delete,
        redelete,
        settled,
        lookup,
        rows_max: ROWS_MAX,
        refresh: None,
        lists: false,
        changed,
        fingerprint: String::new(),
    };
    rule.fingerprint = fingerprint(&rule);
    Some(rule)
}

/// `redelete`, beside what deletes. What a query names is another thing later, so that is not asked again.
fn redelete(section: &mut Section<'_, '_>) -> Redelete {
    let redelete = section.choice_or_duration("redelete").map_or(Redelete::Settled, |choice| match choice.value {
        Either::Duration(after) => Redelete::After(after),
        Either::Choice("off") => Redelete::Off,
        Either::Choice(_) => Redelete::Settled,
    });
    let Some(span) = section.given("redelete") else { return redelete };
    if STALE.iter().all(|name| section.given(name).is_none()) {
        let title = "`redelete` needs `delete`, `delete_tags` or `delete_match`";
        let problem = section.error(Code::MissingPartner, title, span, "nothing is deleted");
        section.report(problem.help("leave `redelete` out"));
    } else if matches!(redelete, Redelete::After(_)) && section.given("lookup").is_some() {
        let title = "a rule with `lookup` takes no duration in `redelete`";
        let problem = section.error(Code::Excluded, title, span, "what it finds may be something else by then");
        section
            .report(problem.help("write:  redelete = \"settled\"; what is looked up goes once the change is visible"));
    }
    redelete
}

fn operations(section: &mut Section<'_, '_>, name: &'static str) -> Operations {
    let Some(on) = section.choices(name) else { return Operations::ALL };
    let named = |name| on.value.iter().any(|operation| operation.value == name);
    Operations { insert: named("insert"), update: named("update"), delete: named("delete") }
}

/// `schema.table`, or a pattern; a part that holds a dot stands in double quotes, in which `""` is one.
pub(super) fn table_name(text: &str) -> Result<TableName, Mistake> {
    const HELP: &str = "write:  table = \"schema.table\", exactly as in the catalog";
    let mistake = |problem: &str| Mistake::whole(Code::TableName, text, problem);
    let Some(parts) = name_parts(text) else {
        return Err(mistake("is not a table's name").help(HELP));
    };
    if let Some(at) = text.find('{') {
        let placeholder = Mistake { range: at..at + 1, ..mistake("holds a placeholder, which no name has") };
        return Err(placeholder.help("for any text write `*`:  table = \"tenant_*.products\""));
    }
    if let (Some(at), true) = (text.find(ANY), text.contains('"')) {
        let quoted =
            Mistake { range: at..at + 1, ..mistake("holds a `*` and quotes, in which it would be no pattern") };
        return Err(quoted.help("write `*` in place of what is quoted too"));
    }
    match parts.as_slice() {
        [name] => Err(mistake("names no schema").help(format!("for example:  table = \"public.{name}\""))),
        [schema, name] => Ok(TableName { schema: schema.clone(), name: name.clone() }),
        [_, schema, name] => {
            let help = format!("the database stands in `url` of [postgres]; write:  table = \"{schema}.{name}\"");
            Err(mistake("has three parts").help(help))
        }
        _ => Err(mistake("is not a table's name").help(HELP)),
    }
}

/// The parts between dots, or `None` if one is empty or its quotes are wrong.
fn name_parts(text: &str) -> Option<Vec<String>> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        let (part, behind) = match rest.strip_prefix('"') {
            None => {
                let (part, behind) = rest.split_at(rest.find('.').unwrap_or(rest.len()));
                (part.to_owned(), behind)
            }
            Some(quoted) => {
                let end = (0..quoted.len()).find(|at| is_closing_quote(quoted, *at))?;
                (quoted[..end].replace("\"\"", "\""), &quoted[end + 1..])
            }
        };
        if part.is_empty() {
            return None;
        }
        parts.push(part);
        if behind.is_empty() {
            return Some(parts);
        }
        rest = behind.strip_prefix('.')?;
    }
}

/// Whether the byte at `at` is a quote that ends a quoted name: the last of an odd number of them.
fn is_closing_quote(quoted: &str, at: usize) -> bool {
    let bytes = quoted.as_bytes();
    let run = bytes[..=at].iter().rev().take_while(|byte| **byte == b'"').count();
    run % 2 == 1 && bytes.get(at + 1) != Some(&b'"')
}

/// Reads what says how the key is written; `None` without a key, or where something it needs is wrong.
fn write_action(
    section: &mut Section<'_, '_>,
    key: Option<Spanned<Template>>,
    defaults: &Defaults,
) -> Option<WriteAction> {
    let value = value(section);
    let owns = section.flag("owns").unwrap_or(false);
    let until = section.parsed("expire_at", expression);
    let keep = section.flag("keep_ttl").unwrap_or(false);
    let tags = templates(section, "tags");
    let own = Defaults::read(section);
    section.given("key")?;
    let is_member = matches!(value, Some(Value::Member { .. }));
    if is_member {
        refuse(
            section,
            &["ttl", "jitter", "every", "expire_at", "keep_ttl", "write", "on_delete", "tags"],
            "a set or sorted set",
        );
    }
    if keep {
        refuse(section, &["ttl", "jitter", "every", "expire_at"], "a key that keeps its TTL");
    }
    if until.is_some() {
        refuse(section, &["ttl", "jitter", "every"], "a key with `expire_at`");
    }
    if !is_member {
        check_needs_ttl(section, &own, defaults);
    }
    let settings = own.or(defaults);
    if !is_member && settings.present_only != Some(true) {
        check_tags(section);
    }
    if settings.warm == Some(false) {
        refuse(section, &["every"], "a rule with `warm = false`");
    }
    let jitter = settings.jitter.as_ref().map_or(0.0, |jitter| jitter.value);
    let life = match (until, settings.ttl.as_ref().and_then(|ttl| ttl.value.clone())) {
        _ if is_member => Life::Forever,
        _ if keep => Life::Keep,
        (Some(until), _) => Life::Until(until),
        (None, Some(ttl)) => Life::Ttl(ttl, jitter),
        (None, None) => Life::Forever,
    };
    if !is_member {
        check_lifetime(section, &settings, &life);
    }
    let warm = settings.warm.unwrap_or(true);
    let every = settings.every.and_then(|every| every.value);
    Some(WriteAction {
        key: key?,
        value: value?,
        present_only: settings.present_only.unwrap_or(false) && !is_member,
        keep_on_delete: settings.keep_on_delete.is_some_and(|keep| keep.value) && !is_member,
        owns,
        warm,
        every: every.filter(|_| warm && matches!(life, Life::Ttl(..))),
        life,
        audit: settings.audit.flatten(),
        tags,
    })
}

/// A key that must be there as long as its row is cannot go with a tag.
fn check_tags(section: &mut Section<'_, '_>) {
    let Some(span) = section.given("tags") else { return };
    let title = "`tags` needs `write = \"present\"`";
    let label = "what deletes by tag would delete a key that must be there";
    let problem = section.error(Code::MissingPartner, title, span, label);
    let problem = problem.help("if it is a cache that the application fills, add:  write = \"present\"");
    section.report(problem.help("else leave `tags` out: the key follows its row by itself"));
}

fn templates(section: &mut Section<'_, '_>, name: &'static str) -> Vec<Spanned<Template>> {
    section.list(name, |text| template(text, Template::parse)).map_or_else(Vec::new, |list| list.value)
}

/// What the key holds. Each kind of value has fields of its own.
fn value(section: &mut Section<'_, '_>) -> Option<Value> {
    let kind = section.choice("value");
    let row = row_value(section);
    let text = section.parsed("template", |text| template(text, Template::parse_free));
    let member = section.parsed("member", |text| template(text, Template::parse_free));
    let score = section.parsed("score", expression);
    const ROW: &[&str] = &["columns", "rename", "strings", "compute"];
    let kind = kind?.value;
    let (needed, foreign): (&[&str], &[&[&str]]) = match kind {
        "string" => (&["template"], &[ROW, &["member", "score"]]),
        "set" => (&["member"], &[ROW, &["template", "score"]]),
        "zset" => (&["member", "score"], &[ROW, &["template"]]),
        "hash" => (&["columns"], &[&["template", "member", "score", "strings"]]),
        _ => (&["columns"], &[&["template", "member", "score"]]),
    };
    refuse(section, &foreign.concat(), &format!("`value = \"{kind}\"`"));
    for name in needed.iter().filter_map(|name| Table::Rule.field(name)) {
        if section.given(name.name).is_none() {
            let problem = section
                .error(
                    Code::MissingPartner,
                    format_args!("`value = \"{kind}\"` needs `{}`", name.name),
                    section.given("value")?,
                    "",
                )
                .help(format!("add:  {} = {}", name.name, name.example));
            section.reader.report_missing(section.header.start, problem);
        }
    }
    match kind {
        "string" => Some(Value::Text(text?)),
        "set" => Some(Value::Member { member: member?, score: None }),
        "zset" => Some(Value::Member { member: member?, score: Some(score?) }),
        "hash" => Some(Value::Row(RowValue { form: RowForm::Hash, ..row? })),
        "rejson" => Some(Value::Row(RowValue { form: RowForm::Rejson, ..row? })),
        _ => Some(Value::Row(row?)),
    }
}

/// Reports each of these fields that is given: `what` has none.
pub(super) fn refuse(section: &mut Section<'_, '_>, names: &[&str], what: &str) {
    for name in names {
        if let Some(span) = section.given(name) {
            let problem = section.error(Code::Excluded, format_args!("{what} takes no `{name}`"), span, "");
            section.report(problem.help(format!("leave `{name}` out")));
        }
    }
}

fn row_value(section: &mut Section<'_, '_>) -> Option<RowValue> {
    let columns = columns(section);
    let rename = section.pairs("rename", |text| match text {
        "" => Err(Mistake::whole(Code::Empty, text, "is an empty name")),
        _ => Ok(text.to_owned()),
    });
    let strings = section.columns("strings").map_or_else(Vec::new, |columns| columns.value);
    let compute = section.pairs("compute", expression);
    let columns = columns?;
    check_columns(section, &columns.value, "rename", rename.iter().map(|(column, _)| column));
    check_columns(section, &columns.value, "strings", strings.iter());
    check_fields(section, &columns.value, &rename, &compute);
    Some(RowValue { form: RowForm::Json, columns, rename, strings, compute })
}

/// `columns`, where `"*"` stands alone.
fn columns(section: &mut Section<'_, '_>) -> Option<Spanned<ColumnSelection>> {
    let Spanned { value: names, span } = section.columns("columns")?;
    let star = names.iter().find(|name| name.value == "*");
    let selection = match star {
        None => ColumnSelection::Named(names),
        Some(star) if names.len() > 1 => {
            let problem = section
                .error(
                    Code::StarAmongColumns,
                    "`columns` names `*` beside other columns",
                    star.span.clone(),
                    "every column already",
                )
                .help("write:  columns = [\"*\"], or name the columns");
            section.report(problem);
            ColumnSelection::All
        }
        Some(_) => ColumnSelection::All,
    };
    Some(Spanned { value: selection, span })
}

/// What a rule can do; it does at least one of these.
pub(crate) const ACTIONS: &[&str] = &["key", "delete", "delete_tags", "delete_match", "bump", "stream", "publish"];

/// What waits until a change is visible.
fn settled(section: &mut Section<'_, '_>) -> Settled {
    Settled {
        delete_tags: templates(section, "delete_tags"),
        delete_match: templates(section, "delete_match"),
        bump: templates(section, "bump"),
        stream: section.subsection("stream", Table::Stream, |stream| {
            let key = stream.parsed("key", |text| template(text, Template::parse));
            let (maxlen, ops) = (stream.count("maxlen"), operations(stream, "ops"));
            Some(StreamAction { key: key?, maxlen, ops })
        }),
        publish: section.subsection("publish", Table::Publish, |publish| {
            publish.parsed("channel", |text| template(text, Template::parse))
        }),
    }
}

/// What `redelete` is about; it is beside at least one of these.
const STALE: &[&str] = &["delete", "delete_tags", "delete_match"];

/// What a rule with `lookup` can do; it does at least one of these.
const WITH_LOOKUP: &[&str] = &["delete", "delete_tags", "delete_match", "bump"];

/// `lookup`, which names keys that go. A written key must be known from its row alone.
fn lookup(section: &mut Section<'_, '_>) -> Option<Spanned<Sql>> {
    let lookup = section.parsed("lookup", sql);
    let span = section.given("lookup")?;
    if section.given("key").is_some() {
        let title = "a rule that writes a key takes no `lookup`";
        let problem = section.error(Code::Excluded, title, span, "a key is written from its row alone");
        section.report(problem.help("let a rule of its own delete the keys that need it"));
    } else if WITH_LOOKUP.iter().all(|name| section.given(name).is_none()) {
        let title = "`lookup` needs `delete`, `delete_tags`, `delete_match` or `bump`";
        let problem = section.error(Code::MissingPartner, title, span, "nothing uses what it finds");
        section.report(problem.help("add:  delete = [\"list:{name}\"], where `name` is a column of the result"));
    }
    lookup
}

/// The statement that `text` is.
pub(super) fn sql(text: &str) -> Result<Sql, Mistake> {
    Sql::parse(text).map_err(|error| Mistake {
        code: Code::Sql,
        range: error.range,
        problem: error.problem.to_owned(),
        label: String::new(),
        help: vec![error.help.to_owned()],
    })
}

/// A rule writes a key or deletes keys. One that has only fields of a key is told that they need it.
fn check_purpose(section: &mut Section<'_, '_>) {
    let of_key = Table::Rule.fields().filter(|field| field.needs.contains(&"key")).map(|field| field.name);
    if of_key.chain(ACTIONS.iter().copied()).all(|name| section.given(name).is_none()) {
        let problem = section
            .error(Code::NoPurpose, "the rule does nothing", section.header.clone(), "neither `key` nor `delete`")
            .help("to write rows through:  key = \"product:{id}\", value = \"json\", columns = [\"*\"]")
            .help("to make keys stale:  delete = [\"product:{id}\"]");
        section.reader.report_missing(section.header.start, problem);
    }
}

fn check_changed(section: &mut Section<'_, '_>, operations: Operations) {
    if let (Some(span), false) = (section.given("changed"), operations.update) {
        let problem = section.error(
            Code::ChangedWithoutUpdate,
            "`changed` has no effect without updates",
            span,
            "looks at UPDATE only",
        );
        let on = section.given("on").unwrap_or_else(|| section.header.clone());
        section.report(
            problem.context(on, "leaves \"update\" out").help("add \"update\" to `on`, or leave `changed` out"),
        );
    }
}

/// `jitter` shortens a TTL and `every` goes before one; without it they do nothing. Those from `[defaults]` just wait for a
/// rule that has a TTL.
fn check_needs_ttl(section: &mut Section<'_, '_>, own: &Defaults, defaults: &Defaults) {
    let ttl = own.ttl.as_ref().or(defaults.ttl.as_ref());
    if ttl.is_some_and(|ttl| ttl.value.is_some())
        || ["ttl", "expire_at", "keep_ttl"].iter().any(|name| section.given(name).is_some())
    {
        return;
    }
    let jitter = own.jitter.as_ref().map(|jitter| ("jitter", jitter.span.clone(), "there is no TTL to shorten"));
    let every = own.every.as_ref().filter(|every| every.value.is_some());
    let every = every.map(|every| ("every", every.span.clone(), "a key without TTL stays"));
    for (name, span, label) in jitter.into_iter().chain(every) {
        let problem = section
            .error(Code::MissingPartner, format_args!("`{name}` needs a `ttl`"), span, label)
            .help(format!("add:  ttl = \"1d\", or leave `{name}` out"));
        section.report(problem);
    }
}

/// What becomes of keys in the long run is easily overlooked.
fn check_lifetime(section: &mut Section<'_, '_>, settings: &Defaults, life: &Life) {
    let ttl = settings.ttl.as_ref().filter(|_| matches!(life, Life::Ttl(..)));
    match (ttl, &settings.keep_on_delete) {
        (None, Some(keep)) if keep.value && matches!(life, Life::Forever) => {
            let title = format!("{}: keys of deleted rows stay for ever", section.title);
            let warning = Diagnostic::warning(Code::KeysStay, title, keep.span.clone(), "and there is no `ttl`");
            section.report(warning.help("add:  ttl = \"1d\", or leave `on_delete` out"));
        }
        (Some(ttl), _) if settings.every.as_ref().is_some_and(|every| every.value.is_some()) => {
            check_every(section, settings, ttl, life);
        }
        (Some(ttl), _) if !settings.present_only.unwrap_or(false) => {
            let title = "keys of rows that do not change go when their TTL is over, and are not written again";
            let warning =
                Diagnostic::warning(Code::KeysGo, title, ttl.span.clone(), "counts from the row's last change")
                    .help("leave `ttl` out if a key should live as long as its row")
                    .help("or have it written again in time:  every = \"12h\"");
            // One TTL in [defaults] is one remark, however many rules take it.
            if !section.reader.diagnostics.contains(&warning) {
                section.report(warning);
            }
        }
        _ => {}
    }
}

/// What is written again must still be there.
fn check_every(section: &mut Section<'_, '_>, settings: &Defaults, ttl: &Spanned<Option<Lifetime>>, life: &Life) {
    let Some(Spanned { value: Some(every), span }) = &settings.every else { return };
    let jitter = settings.jitter.as_ref().map_or(0.0, |jitter| jitter.value);
    if life.constant().is_none_or(|ttl| *every < ttl.mul_f64(1.0 - jitter)) {
        return;
    }
    let label = if jitter > 0.0 { "shortened by `jitter`" } else { "" };
    let problem = section
        .error(Code::OutOfRange, "keys go before `every` writes them again", span.clone(), "not shorter than the TTL")
        .context(ttl.span.clone(), label)
        .help("let them live longer: twice as long as `every`, say");
    if !section.reader.diagnostics.contains(&problem) {
        section.report(problem);
    }
}

/// `rename` and `strings` speak of columns in the value.
fn check_columns<'c>(
    section: &mut Section<'_, '_>,
    columns: &ColumnSelection,
    field: &str,
    named: impl Iterator<Item = &'c Spanned<String>>,
) {
    let ColumnSelection::Named(columns) = columns else { return };
    let known = || columns.iter().map(|column| column.value.as_str());
    for name in named.filter(|name| !known().any(|column| column == name.value)) {
        let problem = section.error(
            Code::NotAmongColumns,
            format_args!("`{field}` names `{}`, which is not among `columns`", name.value),
            name.span.clone(),
            "",
        );
        let help = match crate::suggest::nearest(&name.value, known()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("add \"{}\" to `columns`", name.value),
        };
        section.report(problem.help(help));
    }
}

/// Two fields of one value cannot have the same name.
fn check_fields(
    section: &mut Section<'_, '_>,
    columns: &ColumnSelection,
    rename: &[(Spanned<String>, Spanned<String>)],
    compute: &[(Spanned<String>, Spanned<Expression>)],
) {
    let renamed = |column: &str| rename.iter().find(|(from, _)| from.value == column).map(|(_, to)| to);
    let kept = match columns {
        ColumnSelection::All => &[],
        ColumnSelection::Named(names) => names.as_slice(),
    };
    let kept = kept.iter().filter(|name| renamed(&name.value).is_none());
    let mut fields: Vec<&Spanned<String>> = kept.collect();
    let computed = compute.iter().map(|(name, _)| name);
    for to in rename.iter().map(|(_, to)| to).chain(computed) {
        if let Some(first) = fields.iter().find(|field| field.value == to.value) {
            let problem = section
                .error(
                    Code::SameField,
                    format_args!("the value has two fields `{}`", to.value),
                    to.span.clone(),
                    "again",
                )
                .context(first.span.clone(), "first here")
                .help("give one of them another name");
            section.report(problem);
        }
        fields.push(to);
    }
}

/// A variable that no template uses was misspelt there, or is left over.
pub(super) fn check_vars(
    section: &mut Section<'_, '_>,
    vars: &[(Spanned<String>, Spanned<Template>)],
    write: Option<&WriteAction>,
    delete: &[Spanned<Template>],
    settled: &Settled,
) {
    let of_value = write.and_then(|write| match &write.value {
        Value::Text(text) => Some(&text.value),
        Value::Member { member, .. } => Some(&member.value),
        Value::Row(_) => None,
    });
    let of_keys = write.map(|write| &write.key.value).into_iter().chain(delete.iter().map(|key| &key.value));
    let of_keys = of_keys.chain(write.iter().flat_map(|write| &write.tags).map(|tag| &tag.value));
    let Settled { delete_match, delete_tags, bump, stream, publish } = settled;
    let of_stream = stream.as_ref().map(|stream| &stream.key);
    let stale = delete_match.iter().chain(delete_tags).chain(bump);
    let later = stale.chain(of_stream).chain(publish).map(|template| &template.value);
    let templates = of_keys.chain(of_value).chain(later).chain(vars.iter().map(|(_, var)| &var.value));
    let used: HashSet<&str> = templates.flat_map(Template::placeholders).map(|part| part.name.as_str()).collect();
    for (name, _) in vars.iter().filter(|(name, _)| !used.contains(name.value.as_str())) {
        let title = format!("{}: no template uses `{}`", section.title, name.value);
        let warning = Diagnostic::warning(Code::UnusedVar, title, name.span.clone(), "");
        section.report(warning.help(format!("write {{{}}} in a template, or leave it out", name.value)));
    }
}

/// A hash over everything that decides which keys the rule makes and what they hold, and nothing else: not over
/// comments, the order of fields, or the rule's name.
pub(super) fn fingerprint(rule: &Rule) -> String {
    let sorted = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let names = |names: &[Spanned<String>]| sorted(names.iter().map(|name| name.value.clone()).collect());
    let texts =
        |templates: &[Spanned<Template>]| sorted(templates.iter().map(|key| key.value.text().to_owned()).collect());
    let write = rule.write.as_ref().map(|write| {
        let mut canonical = serde_json::json!({
            "key": write.key.value.text(),
            "ttl_ms": write.life.constant().map(|ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
            "jitter": if let Life::Ttl(_, jitter) = write.life { jitter } else { 0.0 },
            "present_only": write.present_only,
            "keep_on_delete": write.keep_on_delete,
        });
        match &write.value {
            Value::Row(row) => {
                let columns = match &row.columns.value {
                    ColumnSelection::All => None,
                    ColumnSelection::Named(names) => {
                        Some(names.iter().map(|name| name.value.clone()).collect::<Vec<_>>())
                    }
                };
                canonical["value"] = row.form.name().into();
                canonical["columns"] = columns.into();
                canonical["rename"] = serde_json::json!(sorted_pairs(
                    row.rename.iter().map(|(from, to)| (from.value.as_str(), to.value.as_str()))
                ));
                canonical["strings"] = names(&row.strings).into();
                if !row.compute.is_empty() {
                    let compute = row.compute.iter().map(|(name, sql)| (name.value.as_str(), sql.value.text()));
                    canonical["compute"] = serde_json::json!(compute.collect::<Vec<_>>());
                }
            }
            Value::Text(text) => canonical["template"] = text.value.text().into(),
            Value::Member { member, score } => {
                canonical["member"] = member.value.text().into();
                canonical["score"] = score.as_ref().map(|score| score.value.text()).into();
            }
        }
        match &write.life {
            Life::Ttl(Lifetime::OfRow(ttl), _) => canonical["ttl"] = ttl.value.text().into(),
            Life::Until(at) => canonical["expire_at"] = at.value.text().into(),
            Life::Keep => canonical["keep_ttl"] = true.into(),
            Life::Forever | Life::Ttl(Lifetime::Constant(_), _) => {}
        }
        if !write.tags.is_empty() {
            canonical["tags"] = texts(&write.tags).into();
        }
        canonical
    });
    let mut canonical = serde_json::json!({
        "schema": rule.table.value.schema,
        "table": rule.table.value.name,
        "on": [rule.on.insert, rule.on.update, rule.on.delete],
        "vars": sorted_pairs(rule.vars.iter().map(|(name, var)| (name.value.as_str(), var.value.text()))),
        "write": write,
        "delete": texts(&rule.delete),
        "delete_match": texts(&rule.settled.delete_match),
        "bump": texts(&rule.settled.bump),
        "lookup": rule.lookup.as_ref().map(|lookup| lookup.value.text()),
        "changed": rule.changed.as_deref().map(names),
        "when": rule.when.as_ref().map(|when| when.value.text()),
    });
    if !rule.settled.delete_tags.is_empty() {
        canonical["delete_tags"] = texts(&rule.settled.delete_tags).into();
    }
    if rule.names_are_given {
        canonical["names_are_given"] = true.into();
    }
    if let Some(query) = &rule.refresh {
        canonical["refresh"] = serde_json::json!({
            "sql": query.sql.value.text(),
            "shape": query.shape.name(),
            "ttl_ms": query.ttl.map(|(ttl, _)| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX)),
            "jitter": query.ttl.map(|(_, jitter)| jitter),
            "keys": query.keys.as_ref().map(|keys| keys.value.text()),
        });
    }
    let digest = Sha256::digest(canonical.to_string());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sorted_pairs<'p>(pairs: impl Iterator<Item = (&'p str, &'p str)>) -> Vec<(&'p str, &'p str)> {
    let mut pairs: Vec<_> = pairs.collect();
    pairs.sort_unstable();
    pairs
}
