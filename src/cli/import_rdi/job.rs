//! One job → its rules: the source, the steps that change the row, and each key that is written from it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::rules_text::{Names, RuleText, array, commented_out, inline_table, quoted};
use super::Remark;
use super::expression::{Expression, Language};
use super::pipeline::{Listed, Pipeline};
use super::yaml::{Node, Value};
use crate::config::TableName;
use crate::config::quantity::duration_written;

/// A rule as text, with what it says differently.
pub(super) struct Block {
    pub(super) remarks: Vec<Remark>,
    pub(super) text: String,
}

/// The rules of a job: one for each key that it writes.
pub(super) fn rules(file: &str, root: &Node, pipeline: &Pipeline, names: &mut Names) -> Vec<Block> {
    let mut said = Said { file, remarks: Vec::new(), writes_more: false };
    let Some((table, full_rows)) = source(root, &mut said) else {
        return vec![Block { remarks: said.remarks, text: String::new() }];
    };
    let listed = pipeline.listed(&table);
    let mut row = Row { full_rows, ..Row::default() };
    for step in root.get("transform").map(Node::items).unwrap_or_default() {
        row.apply(step, &mut said);
    }
    let outputs = root.get("output").map(Node::items).unwrap_or_default();
    if outputs.is_empty() {
        said.add(root.line, "the job has no `output`");
        return vec![Block { remarks: said.remarks, text: String::new() }];
    }
    let mut blocks = Vec::new();
    for output in outputs {
        // What was said of the row holds for each rule, and is said once.
        let mut own = Said { file, remarks: std::mem::take(&mut said.remarks), writes_more: said.writes_more };
        let job = Job { table: &table, row: &row, listed: &listed, pipeline };
        let rule = job.rule(output, names, &mut own);
        let text = match rule {
            Some(rule) if own.writes_more => commented_out(&rule),
            Some(rule) => rule.to_string(),
            None => String::new(),
        };
        blocks.push(Block { remarks: own.remarks, text });
    }
    blocks
}

/// What is to be said of a job, as it is found.
struct Said<'f> {
    file: &'f str,
    remarks: Vec<Remark>,
    /// Whether the rule would write what the job did not.
    writes_more: bool,
}

impl Said<'_> {
    fn add(&mut self, line: usize, text: impl Into<String>) {
        self.remarks.push(Remark { file: self.file.to_owned(), line, text: text.into() });
    }
}

/// The table, and whether `row_format` is full.
fn source(root: &Node, said: &mut Said<'_>) -> Option<(TableName, bool)> {
    let Some(source) = root.get("source") else {
        said.add(root.line, "the job has no `source`");
        return None;
    };
    let Some(table) = source.get("table") else {
        said.add(source.line, "the source has no `table`");
        return None;
    };
    let name = table.text().unwrap_or_default();
    if name.is_empty() || name.contains('*') {
        said.add(table.line, "a job for every table is not translated: each table needs a rule of its own");
        return None;
    }
    if source.get("schema").is_none() {
        said.add(table.line, "the source has no `schema`; taken to be `public`");
    }
    let schema = source.text_of("schema").unwrap_or("public").to_owned();
    let full_rows = source.text_of("row_format") == Some("full");
    Some((TableName { schema, name: name.to_owned() }, full_rows))
}

/// The row, as the steps leave it.
#[derive(Debug, Default)]
struct Row {
    full_rows: bool,
    /// Fields that are no column: what each stands for, or why that is not known.
    fields: BTreeMap<String, Result<Expression, String>>,
    /// Columns by the names that they got.
    renamed: BTreeMap<String, String>,
    removed: Vec<(String, usize)>,
    conditions: Vec<Expression>,
}

impl Row {
    fn apply(&mut self, step: &Node, said: &mut Said<'_>) {
        let with = step.get("with").unwrap_or(step);
        match step.text_of("uses").unwrap_or_default() {
            "add_field" => several(with).for_each(|field| self.add_field(field, said)),
            "rename_field" => several(with).for_each(|field| self.rename_field(field, said)),
            "remove_field" => several(with).for_each(|field| self.remove_field(field, said)),
            "filter" => self.filter(with, said),
            "map" => {
                said.add(
                    step.line,
                    "`map` is not translated: name what the value holds in `columns`, `rename`, `compute`",
                );
                said.writes_more = true;
            }
            "redis.lookup" => {
                if let Some(field) = with.text_of("field") {
                    self.fields.insert(self.plain(field), Err("comes from `redis.lookup`".to_owned()));
                }
                said.add(
                    step.line,
                    "`redis.lookup` reads from Redis; a rule reads other tables with `lookup = \"select …\"`",
                );
            }
            other => said.add(step.line, format!("the step `{other}` is not translated")),
        }
    }

    /// A field's name without what full rows put before it.
    fn plain(&self, field: &str) -> String {
        let plain = if self.full_rows { field.strip_prefix("after.") } else { None };
        plain.unwrap_or(field).to_owned()
    }

    fn add_field(&mut self, node: &Node, said: &mut Said<'_>) {
        let Some(field) = node.text_of("field").map(|field| self.plain(field)) else {
            return said.add(node.line, "`add_field` names no `field`");
        };
        let value = self.expression(node);
        if let Err(why) = &value {
            said.add(node.line, format!("the field `{field}` is not translated: {why}"));
        }
        self.fields.insert(field, value);
    }

    fn rename_field(&mut self, node: &Node, said: &mut Said<'_>) {
        let (Some(from), Some(to)) = (node.text_of("from_field"), node.text_of("to_field")) else {
            return said.add(node.line, "`rename_field` names no `from_field` and `to_field`");
        };
        let (from, to) = (self.plain(from), self.plain(to));
        match self.fields.remove(&from) {
            Some(computed) => drop(self.fields.insert(to, computed)),
            None => {
                let column = self.renamed.remove(&from).unwrap_or(from);
                self.renamed.insert(to, column);
            }
        }
    }

    fn remove_field(&mut self, node: &Node, said: &mut Said<'_>) {
        let Some(field) = node.text_of("field").or(node.text()).map(|field| self.plain(field)) else {
            return said.add(node.line, "`remove_field` names no `field`");
        };
        if self.fields.remove(&field).is_none() {
            let column = self.renamed.remove(&field).unwrap_or(field);
            self.removed.push((column, node.line));
        }
    }

    fn filter(&mut self, node: &Node, said: &mut Said<'_>) {
        match self.expression(node) {
            Ok(condition) => self.conditions.push(condition),
            Err(why) => {
                said.add(node.line, format!("the filter is not translated: {why}"));
                said.writes_more = true;
            }
        }
    }

    /// The expression of a node that has `expression` and `language`, in terms of columns.
    fn expression(&self, node: &Node) -> Result<Expression, String> {
        let text = node.text_of("expression").ok_or("there is no `expression`")?;
        let language = node.text_of("language").unwrap_or("jmespath");
        let language = Language::from_name(language).ok_or_else(|| format!("`{language}` is no language of jobs"))?;
        self.resolved(Expression::parse(text, language, self.full_rows)?)
    }

    /// A field by its name, in terms of columns.
    fn field(&self, name: &str) -> Result<Expression, String> {
        self.resolved(Expression::Field(self.plain(name)))
    }

    fn resolved(&self, expression: Expression) -> Result<Expression, String> {
        expression.resolved(&|name| match (self.fields.get(&name), self.renamed.get(&name)) {
            (Some(Ok(value)), _) => Ok(value.clone()),
            (Some(Err(why)), _) => Err(format!("the field `{name}` is not known: {why}")),
            (None, Some(column)) => Ok(Expression::Field(column.clone())),
            (None, None) => Ok(Expression::Field(name)),
        })
    }
}

/// The nodes of `fields`, or the node itself.
fn several(with: &Node) -> impl Iterator<Item = &Node> {
    let fields = with.get("fields").map(Node::items).unwrap_or_default();
    let itself = fields.is_empty().then_some(with);
    fields.iter().chain(itself)
}

/// What a value holds.
#[derive(Debug, Default)]
struct Content {
    columns: Vec<String>,
    /// Column and field.
    rename: Vec<(String, String)>,
    /// Field and CEL.
    compute: Vec<(String, String)>,
}

/// A job whose row is known.
struct Job<'j> {
    table: &'j TableName,
    row: &'j Row,
    listed: &'j Listed,
    pipeline: &'j Pipeline,
}

impl Job<'_> {
    /// The rule of one output.
    fn rule(&self, output: &Node, names: &mut Names, said: &mut Said<'_>) -> Option<RuleText> {
        let uses = output.text_of("uses").unwrap_or_default();
        let with = output.get("with").unwrap_or(output);
        if uses != "redis.write" {
            said.add(output.line, format!("the output `{uses}` is not translated"));
            return None;
        }
        if let Some(nest) = with.get("nest") {
            said.add(nest.line, "`nest` is not translated: a query (`[query.NAME]`) makes one key of several tables");
            return None;
        }
        let kind = with.get("data_type");
        let kind_name = kind.and_then(Node::text).or(self.pipeline.data_type.as_deref()).unwrap_or("hash");
        let key = self.key(with, said)?;
        let mut rule = RuleText::new(names.take(&self.table.name), self.table);
        if let Some(condition) = Expression::all_of(&self.row.conditions) {
            rule = rule.with("when", quoted(&condition));
        }
        rule = match kind_name {
            "hash" => self.with_content(rule.with("key", quoted(&key)).with("value", quoted("hash")), with, said),
            "json" => self.with_content(rule.with("key", quoted(&key)).with("value", quoted("rejson")), with, said),
            "set" => {
                let member = self.argument(with, "member", said)?;
                rule.with("key", quoted(&key))
                    .with("value", quoted("set"))
                    .with("member", template(&member, with, said)?)
            }
            "sorted_set" => {
                let (member, score) = (self.argument(with, "member", said)?, self.argument(with, "score", said)?);
                let rule = rule.with("key", quoted(&key)).with("value", quoted("zset"));
                rule.with("member", template(&member, with, said)?).with("score", quoted(&score.cel()))
            }
            "string" => {
                let value = self.argument(with, "value", said)?;
                let rule = rule.with("key", quoted(&key)).with("value", quoted("string"));
                rule.with("template", template(&value, with, said)?)
            }
            "stream" => {
                self.whole_row(with, said);
                rule.with("stream", inline_table([("key", key.as_str())]))
            }
            other => {
                said.add(
                    kind.map_or(with.line, |kind| kind.line),
                    format!("the data type `{other}` is not translated"),
                );
                return None;
            }
        };
        Some(self.with_lifetime(rule, kind_name, with, said))
    }

    /// An entry of a stream holds the whole row, whatever the job left out of it.
    fn whole_row(&self, with: &Node, said: &mut Said<'_>) {
        let known = said.remarks.len();
        if let Some(mapping) = with.get("mapping") {
            said.add(mapping.line, "`mapping`: entries of a stream hold `op`, `table`, `key`, `before`, `after`");
        }
        if !self.listed.columns.is_empty() {
            said.add(with.line, "entries of a stream hold all columns, not only those that config.yaml lists");
        }
        for (column, line) in &self.row.removed {
            said.add(*line, format!("`{column}` is removed: entries of a stream hold it"));
        }
        said.writes_more |= said.remarks.len() > known;
    }

    /// The key's template. Without an expression the key is made of the primary key, which only the catalog knows.
    fn key(&self, with: &Node, said: &mut Said<'_>) -> Option<String> {
        let Some(node) = with.get("key") else {
            let keys = &self.listed.keys;
            if keys.is_empty() {
                let missing = "there is no `key`: it is made of the primary key, which these files do not name";
                said.add(with.line, missing);
                return None;
            }
            let parts: Vec<String> = keys.iter().map(|key| format!("{key}:{{{key}}}")).collect();
            return Some(format!("{}:{}", self.table.name, parts.join(":")));
        };
        let key =
            self.row.expression(node).and_then(|key| key.template().ok_or_else(|| "no template can say it".to_owned()));
        key.map_err(|why| said.add(node.line, format!("the key is not translated: {why}"))).ok()
    }

    /// What the argument of this name, a field, stands for.
    fn argument(&self, with: &Node, name: &str, said: &mut Said<'_>) -> Option<Expression> {
        let args = with.get("args").unwrap_or(with);
        let Some(field) = args.text_of(name) else {
            said.add(args.line, format!("`args` has no `{name}`"));
            return None;
        };
        self.row.field(field).map_err(|why| said.add(args.line, why)).ok()
    }

    /// The rule with `columns`, `rename` and `compute`.
    fn with_content(&self, rule: RuleText, with: &Node, said: &mut Said<'_>) -> RuleText {
        let content = match with.get("mapping") {
            Some(mapping) => self.mapped(mapping, said),
            None => self.whole(said),
        };
        let mut rule = rule.with("columns", array(content.columns.iter().map(String::as_str)));
        let pairs = |pairs: &[(String, String)]| inline_table(pairs.iter().map(|(a, b)| (a.as_str(), b.as_str())));
        if !content.rename.is_empty() {
            rule = rule.with("rename", pairs(&content.rename));
        }
        if !content.compute.is_empty() {
            rule = rule.with("compute", pairs(&content.compute));
        }
        if let Some(merge) = with.get("on_update").filter(|strategy| strategy.text() == Some("merge")) {
            said.add(merge.line, "`on_update: merge`: a rule replaces the whole value");
        }
        rule
    }

    /// The fields that `mapping` lists.
    fn mapped(&self, mapping: &Node, said: &mut Said<'_>) -> Content {
        let mut content = Content::default();
        for item in mapping.items() {
            let (name, alias) = match (&item.value, item.entries()) {
                (Value::Text(name), _) => (name, None),
                (_, [(name, alias)]) => (name, alias.text()),
                _ => {
                    said.add(item.line, "this is no field and its alias");
                    continue;
                }
            };
            let field = alias.unwrap_or(name);
            if field.contains('.') {
                said.add(item.line, format!("the nested field `{field}` is not translated"));
                continue;
            }
            match self.row.field(name) {
                Ok(Expression::Field(column)) => content.add_column(column, field),
                Ok(value) => content.compute.push((field.to_owned(), value.cel())),
                Err(why) => said.add(item.line, why),
            }
        }
        content
    }

    /// Every field that the steps have left.
    fn whole(&self, said: &mut Said<'_>) -> Content {
        let mut content = Content::default();
        let is_removed = |column: &String| self.row.removed.iter().any(|(removed, _)| removed == column);
        let new_name =
            |column: &String| self.row.renamed.iter().find(|(_, own)| *own == column).map(|(to, _)| to.clone());
        if self.listed.columns.is_empty() {
            content.columns.push("*".to_owned());
            content.rename.extend(self.row.renamed.iter().map(|(to, column)| (column.clone(), to.clone())));
            for (column, line) in &self.row.removed {
                said.add(*line, format!("`{column}` is removed: name the others in `columns`"));
                said.writes_more = true;
            }
        }
        for column in self.listed.columns.iter().filter(|column| !is_removed(column)) {
            content.add_column(column.clone(), &new_name(column).unwrap_or_else(|| column.clone()));
        }
        let known = self.row.fields.iter().filter_map(|(field, value)| Some((field, value.as_ref().ok()?)));
        content.compute.extend(known.map(|(field, value)| (field.clone(), value.cel())));
        content
    }

    fn with_lifetime(&self, rule: RuleText, kind: &str, with: &Node, said: &mut Said<'_>) -> RuleText {
        let Some(expire) = with.get("expire") else { return rule };
        let seconds = expire.text().and_then(|text| text.parse::<u64>().ok());
        match (kind, seconds) {
            (_, Some(0)) => rule,
            ("hash" | "json" | "string", Some(seconds)) => {
                rule.with("ttl", quoted(&duration_written(Duration::from_secs(seconds))))
            }
            ("hash" | "json" | "string", None) => {
                said.add(expire.line, "`expire` is an expression; `ttl` takes one in CEL, `expire_at` a column");
                rule
            }
            _ => {
                said.add(expire.line, format!("`expire` of a {kind}: its keys have no time to live"));
                rule
            }
        }
    }
}

impl Content {
    fn add_column(&mut self, column: String, field: &str) {
        if column != field {
            self.rename.push((column.clone(), field.to_owned()));
        }
        self.columns.push(column);
    }
}

/// A field's template, in quotes.
fn template(value: &Expression, with: &Node, said: &mut Said<'_>) -> Option<String> {
    let template = value.template();
    if template.is_none() {
        said.add(with.line, format!("no template can say `{}`", value.cel()));
    }
    template.map(|template| quoted(&template))
}
