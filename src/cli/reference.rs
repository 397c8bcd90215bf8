//! `keepstep reference`: every field of the rules file, as Markdown or as JSON Schema, from the one table of fields.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use serde_json::{Map, Value, json};

use crate::config::code::CODES;
use crate::config::fields::{Fallback, Field, Kind, Table};
use crate::config::quantity::{duration_written, size_written};
use crate::config::rule::ACTIONS;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  keepstep reference | less
  keepstep reference --schema > keepstep.schema.json

Editors that read TOML with Taplo (Even Better TOML, Zed, Helix) complete and check a rules file
whose first line is  #:schema ./keepstep.schema.json")]
pub(super) struct Arguments {
    /// The JSON Schema of the rules file instead, for editors
    #[arg(long)]
    schema: bool,
}

pub(super) fn execute(arguments: &Arguments) -> Result<ExitCode> {
    let text = if arguments.schema { format!("{:#}\n", json_schema()) } else { markdown() };
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

const INTRODUCTION: &str = "\
# The rules file

TOML, by default `keepstep.toml`. In the strings of [postgres], [redis] and [admin], `${NAME}` stands for an
environment variable, `${NAME:-text}` for one with a default, and `${file:/path}` for the content of a file; `$${` is a
literal `${`.
";

/// The reference as Markdown, which reads well as it is.
fn markdown() -> String {
    let tables = Table::ALL.map(|table| {
        let fields: String = table.fields().map(field_markdown).collect();
        format!("\n## {}\n\n{}\n{fields}", table.header(), table.meaning())
    });
    let codes: String = CODES.iter().map(|known| format!("- `{}` {}\n", known.code, known.title)).collect();
    format!(
        "{INTRODUCTION}{}\n## Messages\n\n`keepstep explain KS001` tells more about each code.\n\n{codes}",
        tables.concat()
    )
}

fn field_markdown(field: &Field) -> String {
    let default = match field.default {
        Fallback::Required => "required".to_owned(),
        Fallback::Absent => "no default".to_owned(),
        Fallback::Value(value) => format!("default `{value}`"),
    };
    let needs = field.needs.iter().map(|need| format!("`{need}`")).collect::<Vec<_>>().join(" and ");
    let needs = if needs.is_empty() { needs } else { format!("Needs {needs}.") };
    let sentences: Vec<_> = [field.meaning, &needs, field.limits].into_iter().filter(|text| !text.is_empty()).collect();
    let (name, kind, example) = (field.name, described(field.kind), field.example);
    format!("\n### `{name}`\n\n{kind}; {default}\n\n{}\n\n    {name} = {example}\n", sentences.join(" "))
}

/// What a field takes.
fn described(kind: Kind) -> String {
    let quoted =
        |choices: &[&str]| choices.iter().map(|choice| format!("`\"{choice}\"`")).collect::<Vec<_>>().join(", ");
    match kind {
        Kind::Text => "string".to_owned(),
        Kind::Url => "URL".to_owned(),
        Kind::Path => "path".to_owned(),
        Kind::Address => "`\"address:port\"` or `\"off\"`".to_owned(),
        Kind::Choice(choices) => format!("one of {}", quoted(choices)),
        Kind::Choices(choices) => format!("array of {}", quoted(choices)),
        Kind::Duration { min, max, off } => {
            let off = if off { ", or `\"off\"`" } else { "" };
            format!("duration from {} to {}{off}", duration_written(min), duration_written(max))
        }
        Kind::ChoiceOrDuration { choices, min, max } => {
            let (min, max) = (duration_written(min), duration_written(max));
            format!("one of {}, or a duration from {min} to {max}", quoted(choices))
        }
        Kind::Size { min, max } => format!("size from {} to {}", size_written(min), size_written(max)),
        Kind::Share => "percentage from 0% to below 100%".to_owned(),
        Kind::RowsPerSecond => "rows per second, as `\"5000/s\"`, or `\"off\"`".to_owned(),
        Kind::SharePerMinute => "share per time, as `\"0.1%/min\"`, `\"5%/h\"`, `\"100%/d\"`, or `\"off\"`".to_owned(),
        Kind::Flag => "`true` or `false`".to_owned(),
        Kind::Count { min, max } => format!("integer from {min} to {max}"),
        Kind::TableName => "`\"schema.table\"`".to_owned(),
        Kind::Template => "key template".to_owned(),
        Kind::Templates => "array of key templates".to_owned(),
        Kind::Texts => "array of strings".to_owned(),
        Kind::Columns => "array of column names".to_owned(),
        Kind::Pairs => "table of strings".to_owned(),
        Kind::Expression => "expression".to_owned(),
        Kind::Section => "table, see below".to_owned(),
        Kind::Sections => "array of tables, see below".to_owned(),
    }
}

/// The JSON Schema of the rules file (draft 2020-12), for editors. It is weaker than `check`: what TOML cannot show,
/// such as whether a template is one, it lets through.
fn json_schema() -> Value {
    let mut properties = Map::new();
    properties.extend(Table::Top.fields().map(|field| (field.name.to_owned(), field_schema(field))));
    for table in Table::AT_TOP {
        let schema = table_schema(table);
        let named = json!({ "type": "object", "additionalProperties": schema, "minProperties": 1 });
        properties
            .insert(table.key().to_owned(), if matches!(table, Table::Rule | Table::Query) { named } else { schema });
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "keepstep rules file",
        "type": "object",
        "properties": properties,
        // The rules file itself, or one that it includes.
        "anyOf": [{ "required": ["postgres", "redis"] }, { "required": ["rule"] }],
        "additionalProperties": false,
    })
}

fn table_schema(table: Table) -> Value {
    let properties: Map<_, _> = table.fields().map(|field| (field.name.to_owned(), field_schema(field))).collect();
    let required = table.fields().filter(|field| field.default == Fallback::Required);
    let needs = table.fields().filter(|field| !field.needs.is_empty());
    let needs: Map<_, _> = needs.map(|field| (field.name.to_owned(), json!(field.needs))).collect();
    let mut schema = json!({
        "description": table.meaning(),
        "type": "object",
        "properties": properties,
        "required": required.map(|field| field.name).collect::<Vec<_>>(),
        "dependentRequired": needs,
        "additionalProperties": false,
    });
    if table == Table::Rule {
        schema["anyOf"] = ACTIONS.iter().map(|action| json!({ "required": [action] })).collect();
    }
    schema
}

fn field_schema(field: &Field) -> Value {
    let value = match (field.kind, field.name) {
        (Kind::Section, "stream") => table_schema(Table::Stream),
        (Kind::Section, _) => table_schema(Table::Publish),
        (Kind::Sections, _) => json!({ "type": "array", "items": table_schema(Table::On), "minItems": 1 }),
        (kind, _) => value_schema(kind),
    };
    let constrained = value.get("pattern").is_some() || value.get("enum").is_some();
    // A reference may stand for any of the values.
    let mut schema = if field.table.interpolates() && constrained {
        json!({ "anyOf": [value, { "type": "string", "pattern": r"\$\{" }] })
    } else {
        value
    };
    schema["description"] = json!(field.meaning);
    // What is a value of TOML here is one of JSON too.
    if let Fallback::Value(default) = field.default
        && let Ok(default) = serde_json::from_str::<Value>(default)
    {
        schema["default"] = default;
    }
    schema
}

/// The values a field takes, as far as a pattern can say.
fn value_schema(kind: Kind) -> Value {
    let text = json!({ "type": "string", "minLength": 1 });
    let pattern = |pattern: &str| json!({ "type": "string", "pattern": pattern });
    let array = |items: Value| json!({ "type": "array", "items": items, "minItems": 1, "uniqueItems": true });
    match kind {
        Kind::Text => json!({ "type": "string" }),
        Kind::Url | Kind::Path | Kind::Template | Kind::Expression => text,
        Kind::Address => pattern(r"^off$|:[0-9]+$"),
        Kind::Choice(choices) => json!({ "type": "string", "enum": choices }),
        Kind::Choices(choices) => array(json!({ "type": "string", "enum": choices })),
        Kind::Duration { off: true, .. } => pattern(r"^off$|^0$|^\s*[0-9].*[a-zA-Z]\s*$"),
        Kind::Duration { off: false, .. } => pattern(r"^0$|^\s*[0-9].*[a-zA-Z]\s*$"),
        Kind::ChoiceOrDuration { choices, .. } => {
            let words: String = choices.iter().map(|choice| format!("^{choice}$|")).collect();
            pattern(&format!(r"{words}^\s*[0-9].*[a-zA-Z]\s*$"))
        }
        Kind::Size { .. } => pattern(r"^[0-9]+\s*[kKmMgGtT]?[iI]?[bB]\s*$"),
        Kind::Share => pattern(r"^[0-9.]+%$"),
        Kind::RowsPerSecond => pattern(r"^off$|^[0-9]+/s$"),
        Kind::SharePerMinute => pattern(r"^off$|^[0-9.]+%/(min|h|d)$"),
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Count { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::TableName => pattern(r"\."),
        Kind::Templates | Kind::Columns | Kind::Texts => array(text),
        Kind::Section => json!({ "type": "object" }),
        Kind::Sections => json!({ "type": "array" }),
        Kind::Pairs => json!({ "type": "object", "additionalProperties": { "type": "string" } }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_is_this() {
        insta::assert_snapshot!(markdown());
    }

    #[test]
    fn every_default_is_in_the_schema() {
        let schema = json_schema();
        let of_rule = &schema["properties"]["rule"]["additionalProperties"]["properties"];
        let fields = |table: Table| match table {
            Table::Rule => of_rule,
            Table::Top => &schema["properties"],
            Table::Stream | Table::Publish => &of_rule[table.key()]["properties"],
            Table::Query => &schema["properties"]["query"]["additionalProperties"]["properties"],
            Table::On => {
                let of_query = &schema["properties"]["query"]["additionalProperties"]["properties"];
                &of_query["on"]["items"]["properties"]
            }
            _ => &schema["properties"][table.key()]["properties"],
        };
        for field in Table::ALL.into_iter().flat_map(Table::fields) {
            let shown = &fields(field.table)[field.name];
            assert_eq!(matches!(field.default, Fallback::Value(_)), shown.get("default").is_some(), "{}", field.name);
        }
    }
}
