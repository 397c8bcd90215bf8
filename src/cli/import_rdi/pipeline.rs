//! `config.yaml`: what it says of all jobs.

use super::Remark;
use super::yaml::Node;
use crate::config::TableName;

/// What jobs take from it.
#[derive(Debug, Default)]
pub(super) struct Pipeline {
    /// `target_data_type`, for jobs that do not name one.
    pub(super) data_type: Option<String>,
    tables: Vec<(TableName, Listed)>,
}

/// What it lists of a table.
#[derive(Clone, Debug, Default)]
pub(super) struct Listed {
    /// The columns that are captured; empty for all.
    pub(super) columns: Vec<String>,
    /// The columns that stand for a primary key; empty if it has one.
    pub(super) keys: Vec<String>,
}

impl Pipeline {
    /// Reads config.yaml. Its connections are not copied, and what only tunes Redis Data Integration is left alone.
    pub(super) fn read(root: &Node, remarks: &mut Vec<Remark>) -> Self {
        let mut remark =
            |line: usize, text: String| remarks.push(Remark { file: "config.yaml".to_owned(), line, text });
        let mut pipeline = Pipeline::default();
        let sources = root.get("sources").map(Node::entries).unwrap_or_default();
        if let [_, (second, node), ..] = sources {
            remark(node.line, format!("a second source, `{second}`: one rules file follows one database"));
        }
        for (_, source) in sources {
            let kind = source.get("connection").and_then(|connection| connection.get("type"));
            if let Some(kind) = kind.filter(|kind| kind.text() != Some("postgresql")) {
                remark(kind.line, format!("the source is {}, not postgresql", kind.text().unwrap_or("something else")));
            }
            for (name, table) in source.get("tables").map(Node::entries).unwrap_or_default() {
                match name.split_once('.') {
                    Some((schema, name)) => {
                        let name = TableName { schema: schema.to_owned(), name: name.to_owned() };
                        pipeline.tables.push((name, listed(table)));
                    }
                    None => remark(table.line, format!("the table `{name}` has no schema")),
                }
            }
        }
        if let Some([_, (second, node), ..]) = root.get("targets").map(Node::entries) {
            remark(node.line, format!("a second target, `{second}`: one rules file writes to one Redis"));
        }
        let processors = root.get("processors");
        pipeline.data_type = processors.and_then(|own| own.text_of("target_data_type")).map(str::to_owned);
        let strategy = processors.and_then(|own| own.get("json_update_strategy"));
        if let Some(merge) = strategy.filter(|strategy| strategy.text() == Some("merge")) {
            remark(merge.line, "`json_update_strategy: merge`: a rule replaces the whole value".to_owned());
        }
        pipeline
    }

    /// What it lists of a table; nothing for one that it does not name.
    pub(super) fn listed(&self, table: &TableName) -> Listed {
        self.tables.iter().find(|(name, _)| name == table).map(|(_, listed)| listed.clone()).unwrap_or_default()
    }
}

fn listed(table: &Node) -> Listed {
    let texts = |key: &str| {
        let items = table.get(key).map(Node::items).unwrap_or_default();
        items.iter().filter_map(Node::text).map(str::to_owned).collect()
    };
    Listed { columns: texts("columns"), keys: texts("keys") }
}
