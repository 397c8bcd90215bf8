//! Which server process answers: a restart and a failover show here even where no data was lost.
//!
//! The checkpoint decides whether something was lost, because replicas, dumps and the append-only file all hold a
//! prefix of what was written. Who answers only explains it.

use std::collections::BTreeMap;

use redis::{Cmd, Value};

use super::super::connection::Failure;
use super::unexpected;

/// From INFO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Instance {
    /// `run_id`: another one after each start.
    run: String,
    /// `master_replid`: another one after a promotion, and after a start that could not go on with the old history.
    history: String,
}

impl Instance {
    /// What asks for it. One section each: Redis 6 knows no more in one call.
    pub(super) fn commands() -> [Cmd; 2] {
        ["server", "replication"].map(|section| {
            let mut info = redis::cmd("INFO");
            info.arg(section);
            info
        })
    }

    /// From the replies to [`Instance::commands`].
    pub(super) fn from_replies(replies: &[Value]) -> Result<Self, Failure> {
        let texts: Vec<String> = replies.iter().map(text).collect::<Result<_, _>>()?;
        let lines = texts.iter().flat_map(|text| text.lines());
        let fields: BTreeMap<&str, &str> = lines.filter_map(|line| line.trim_end().split_once(':')).collect();
        let field = |name| fields.get(name).copied().unwrap_or_default().to_owned();
        Ok(Instance { run: field("run_id"), history: field("master_replid") })
    }

    /// What happened, if `now` is not what this was.
    pub(super) fn became(&self, now: &Instance) -> Option<&'static str> {
        match (self.run == now.run, self.history == now.history) {
            (true, true) => None,
            (true, false) => Some("Redis was promoted, or its replication history is another one"),
            (false, _) => Some("Redis was restarted, or another server answers in its place"),
        }
    }
}

fn text(reply: &Value) -> Result<String, Failure> {
    match reply {
        Value::BulkString(info) => Ok(String::from_utf8_lossy(info).into_owned()),
        Value::VerbatimString { text, .. } => Ok(text.clone()),
        other => Err(unexpected("INFO", other)),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn instance(run: &str, history: &str) -> Instance {
        let reply = |text: String| Value::BulkString(text.into_bytes());
        let server = reply(format!("# Server\r\nredis_version:7.0.15\r\nrun_id:{run}\r\n"));
        let replication = reply(format!("# Replication\r\nrole:master\r\nmaster_replid:{history}\r\n"));
        Instance::from_replies(&[server, replication]).ok().unwrap()
    }

    #[test]
    fn a_restart_and_a_promotion_are_told_apart() {
        let before = instance("a", "x");
        assert_eq!(before, Instance { run: "a".into(), history: "x".into() });
        assert_eq!(before.became(&instance("a", "x")), None);
        assert!(before.became(&instance("a", "y")).unwrap().contains("promoted"));
        assert!(before.became(&instance("b", "x")).unwrap().contains("restarted"));
        assert!(Instance::from_replies(&[Value::Nil, Value::Nil]).is_err());
    }
}
