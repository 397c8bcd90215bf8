//! What reaches a running session from outside: to warm, to verify, to reload. Types and the reading of them; pure.
//!
//! Whoever asks names rules as people do ([`Command`]): over HTTP, on the command line, in a logical message. The rules
//! in force turn that into an [`Order`], which the session carries out; what becomes of a pass comes back as
//! [`Report`]s.
//!
//! **Architecture invariant:** a logical message never carries SQL. Every role that may connect can emit one, and a
//! condition in it would be run with keepstep's rights.

use std::sync::Arc;

use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::config::open::{OpenRule, is_meant};
use crate::config::{Config, MessageCommands, Rule};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{Event, Position};
pub use crate::snapshot::audit::Kind;
use crate::source::slot::MESSAGE_PREFIX;
use crate::suggest::nearest;

/// How many orders may wait for the session.
pub const ORDERS_MAX: usize = 4;
/// How many reports may wait for whoever asked.
pub const REPORTS_MAX: usize = 256;
/// How many commands of one transaction are obeyed.
const COMMANDS_MAX: usize = 16;

/// What the session shall do.
#[derive(Debug)]
pub enum Order {
    /// Go through tables.
    Pass(PassOrder),
    /// End in good order, and begin again with this configuration.
    Reload(Arc<Config>),
}

/// One pass over the tables of some rules.
#[derive(Debug)]
pub struct PassOrder {
    /// The rules, by their numbers in [`Config::rules`]: ascending, none twice, each with a key that it writes.
    pub rules: Vec<u16>,
    /// What for.
    pub purpose: Purpose,
    /// Only rows that meet this SQL condition; the rules are then of one table.
    pub filter: Option<String>,
    /// Who wants to know. Closed, whoever asked has gone away and the pass may end.
    pub reports: mpsc::Sender<Report>,
}

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Purpose {
    /// Writes the key of every row.
    Warm,
    /// Compares keys with rows.
    Verify {
        /// The share of the rows that are looked at: above 0.0, at most 1.0.
        sample: f64,
        /// Whether what differs is made right.
        repair: bool,
    },
}

/// What is said of a pass, one JSON object a line over HTTP. Holds row values: for whoever asked, never for the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "lowercase")]
pub enum Report {
    /// How far it has come.
    Progress {
        /// The rule.
        rule: String,
        /// Rows read for it so far.
        rows: u64,
        /// How many there are, by Postgres's estimate.
        rows_total: u64,
    },
    /// A key that is not what its row says.
    Difference {
        /// The rule that owns it.
        rule: String,
        /// The key.
        key: String,
        /// What is wrong with it.
        kind: Kind,
        /// What it holds; nothing where it is missing.
        holds: Option<String>,
        /// What it should hold; nothing where it should not be.
        should: Option<String>,
        /// Whether it was made right.
        repaired: bool,
    },
    /// The last word: the pass is complete.
    Done(Totals),
    /// The last word: the pass ended before it was complete.
    Failed {
        /// Why.
        error: String,
    },
}

impl Report {
    /// Whether nothing follows it.
    pub fn is_last(&self) -> bool {
        matches!(self, Report::Done(_) | Report::Failed { .. })
    }
}

/// What a pass came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Rows read.
    pub rows: u64,
    /// Keys compared.
    pub checked: u64,
    /// Of these, those that were not right.
    pub diverged: u64,
    /// Keys that are absent because their TTL is over.
    pub expired: u64,
    /// Keys that were left out, because they were changing just then.
    pub skipped: u64,
}

/// The reports of a pass, as whoever asked receives them: up to one last word, which never fails to come.
#[derive(Debug)]
pub struct Reports {
    receiver: mpsc::Receiver<Report>,
    complete: bool,
}

impl Reports {
    /// A bounded channel: the end for the [`PassOrder`], and the one that is read.
    pub fn channel() -> (mpsc::Sender<Report>, Self) {
        let (sender, receiver) = mpsc::channel(REPORTS_MAX);
        (sender, Reports { receiver, complete: false })
    }

    /// The next one; `None` behind the last.
    pub async fn next(&mut self) -> Option<Report> {
        if self.complete {
            return None;
        }
        let report = self.receiver.recv().await.unwrap_or_else(|| Report::Failed {
            error: "the session ended before the pass was complete; the log of the daemon says why".to_owned(),
        });
        self.complete = report.is_last();
        Some(report)
    }
}

/// What somebody asks for, before anybody knows whether there are such rules.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// To warm or to verify.
    Pass(PassRequest),
    /// To read the rules file again.
    Reload,
}

/// A pass that somebody asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct PassRequest {
    /// The names of the rules; none is all that make sense.
    pub rules: Vec<String>,
    /// What for.
    pub purpose: Purpose,
    /// Only rows that meet this SQL condition.
    pub filter: Option<String>,
}

impl PassRequest {
    /// To warm, from the parameters of `POST /warm`.
    pub fn warm(parameters: &[(String, String)]) -> Result<Self> {
        let mut request = PassRequest { rules: Vec::new(), purpose: Purpose::Warm, filter: None };
        for (name, value) in parameters {
            match name.as_str() {
                "rule" => request.rules.push(value.clone()),
                "where" if request.filter.is_none() => request.filter = Some(value.clone()),
                _ => return Err(unwanted(name, "`rule` (several times) and `where` (once)")),
            }
        }
        Ok(request)
    }

    /// To verify, from the parameters of `POST /verify`.
    pub fn verify(parameters: &[(String, String)]) -> Result<Self> {
        let (mut rules, mut sample, mut repair) = (Vec::new(), 1.0, false);
        for (name, value) in parameters {
            match name.as_str() {
                "rule" => rules.push(value.clone()),
                "sample" => sample = parse_sample(value).map_err(usage)?,
                "repair" => repair = flag(name, value)?,
                _ => return Err(unwanted(name, "`rule` (several times), `sample` and `repair`")),
            }
        }
        Ok(PassRequest { rules, purpose: Purpose::Verify { sample, repair }, filter: None })
    }

    /// The path and the parameters from which the daemon reads the same request.
    pub fn target(&self) -> String {
        let mut parameters: Vec<(&str, String)> = self.rules.iter().map(|rule| ("rule", rule.clone())).collect();
        let path = match self.purpose {
            Purpose::Warm => "/warm",
            Purpose::Verify { sample, repair } => {
                parameters.push(("sample", format!("{}%", sample * 100.0)));
                parameters.push(("repair", u8::from(repair).to_string()));
                "/verify"
            }
        };
        parameters.extend(self.filter.iter().map(|filter| ("where", filter.clone())));
        let encoded = parameters.iter().map(|(name, value)| {
            let value = utf8_percent_encode(value, NON_ALPHANUMERIC);
            format!("{name}={value}")
        });
        format!("{path}?{}", encoded.collect::<Vec<_>>().join("&"))
    }

    /// The order that carries it out under these rules.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`]: a rule that is not there or writes no key, a condition over several tables.
    pub fn order(&self, config: &Config, reports: mpsc::Sender<Report>) -> Result<PassOrder> {
        let mut rules = match self.rules.as_slice() {
            [] => self.everything(config)?,
            names => names.iter().map(|name| numbers(config, name)).collect::<Result<Vec<_>>>()?.concat(),
        };
        rules.sort_unstable();
        rules.dedup();
        let mut tables = rules.iter().map(|number| &config.rules[usize::from(*number)].table.value);
        let first = tables.next();
        if self.filter.is_some() && tables.any(|table| Some(table) != first) {
            return Err(usage("a condition is about the rows of one table, and these rules have several")
                .hint("name one rule with --rule"));
        }
        Ok(PassOrder { rules, purpose: self.purpose, filter: self.filter.clone(), reports })
    }

    /// Every rule that it can be about: those that write keys, to warm only those that are warmed without being named.
    fn everything(&self, config: &Config) -> Result<Vec<u16>> {
        let wanted = |rule: &Rule| match self.purpose {
            Purpose::Warm => rule.lists || rule.write.as_ref().is_some_and(|write| write.warm),
            Purpose::Verify { .. } => rule.lists || rule.write.is_some(),
        };
        let numbered = (0_u16..).zip(&config.rules);
        let numbers: Vec<u16> = numbered.filter(|(_, rule)| wanted(rule)).map(|(number, _)| number).collect();
        match (numbers.is_empty(), self.purpose) {
            (false, _) => Ok(numbers),
            (true, Purpose::Warm) => Err(usage("no rule is to be warmed: none writes keys without `warm = false`")),
            (true, Purpose::Verify { .. }) => Err(usage("there is nothing to verify: no rule writes keys")),
        }
    }
}

/// The numbers of the rules that are meant by this name, which must write keys: one, or those of every table that a pattern
/// matches. Of the rules that a query is, one answers for its keys.
fn numbers(config: &Config, name: &str) -> Result<Vec<u16>> {
    let of_query = |rule: &Rule| rule.lists && rule.refresh.as_ref().is_some_and(|query| query.name.value == name);
    let meant = |rule: &Rule| is_meant(&rule.name.value, name) || of_query(rule);
    let found: Vec<(u16, &Rule)> = (0_u16..).zip(&config.rules).filter(|(_, rule)| meant(rule)).collect();
    if found.iter().any(|(_, rule)| rule.write.is_none() && !rule.lists) {
        return Err(usage(format!("rule `{name}` writes no key, so there is nothing to compare or to fill")));
    }
    if found.is_empty() && !config.open.iter().any(|open| open.name() == name) {
        let unknown = usage(format!("there is no rule `{}`", name.escape_debug()));
        let names = config.open.iter().map(OpenRule::name).chain(config.rules.iter().map(|rule| &*rule.name.value));
        return Err(match nearest(name, names) {
            Some(near) => unknown.hint(format!("did you mean `{near}`?")),
            None => unknown,
        });
    }
    match found.is_empty() {
        true => Err(usage(format!("no table matches the pattern of rule `{name}`"))),
        false => Ok(found.into_iter().map(|(number, _)| number).collect()),
    }
}

/// The share of rows that `--sample 1%` asks for: above 0%, at most 100%.
pub fn parse_sample(text: &str) -> Result<f64, String> {
    let percent = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    match percent {
        Some(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        _ => Err("a sample is a percentage above 0% and up to 100%, as `1%`".to_owned()),
    }
}

fn flag(name: &str, value: &str) -> Result<bool> {
    match value {
        "" | "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(usage(format!("`{name}` is 1 or 0"))),
    }
}

fn unwanted(name: &str, wanted: &str) -> Error {
    usage(format!("unexpected parameter `{}`: there are {wanted}", name.escape_debug()))
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage, message)
}

/// The content of a logical message that is a command, as
/// `select pg_logical_emit_message(true, 'keepstep', '{"command": "warm", "rule": "product"}')` sends it.
#[derive(Deserialize)]
#[serde(tag = "command", rename_all = "lowercase", deny_unknown_fields)]
enum Message {
    Warm {
        #[serde(default)]
        rule: Names,
    },
    Verify {
        #[serde(default)]
        rule: Names,
        sample: Option<String>,
        #[serde(default)]
        repair: bool,
    },
    Reload {},
}

/// One name, or several in an array.
#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(String),
    Several(Vec<String>),
}

impl Default for Names {
    fn default() -> Self {
        Names::Several(Vec::new())
    }
}

impl From<Names> for Vec<String> {
    fn from(names: Names) -> Self {
        match names {
            Names::One(name) => vec![name],
            Names::Several(names) => names,
        }
    }
}

/// The commands in the stream, each obeyed once its transaction is committed and done with.
#[derive(Debug)]
pub struct Messages {
    /// What is in the cache already has been obeyed.
    good: Position,
    /// Those of the transaction under way.
    heard: Vec<Result<Command, Unreadable>>,
}

/// A message that looks like a command and is none. What it holds is not repeated: anybody may have written it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not JSON of a form that is known.
    #[error("it is not like {{\"command\": \"warm\", \"rule\": \"product\"}}, from column {column} on")]
    Json {
        /// Where reading ended.
        column: usize,
    },
    /// A sample that is none.
    #[error("its sample is no percentage above 0% and up to 100%, as \"1%\"")]
    Sample,
    /// Too many in one transaction.
    #[error("it is one of more than {} in a transaction", COMMANDS_MAX)]
    TooMany,
}

impl Messages {
    /// In a stream that goes on from here.
    pub fn new(good: Position) -> Self {
        Messages { good, heard: Vec::new() }
    }

    /// Listens; behind the commit of a transaction that held commands they are returned.
    pub fn hear(&mut self, event: &Event<'_>) -> Vec<Result<Command, Unreadable>> {
        match event {
            Event::Message { transactional: true, prefix, content, .. } if *prefix == MESSAGE_PREFIX.as_bytes() => {
                match read(content) {
                    Some(_) if self.heard.len() > COMMANDS_MAX => {}
                    Some(_) if self.heard.len() == COMMANDS_MAX => self.heard.push(Err(Unreadable::TooMany)),
                    Some(command) => self.heard.push(command),
                    None => {}
                }
                Vec::new()
            }
            Event::Commit { end_lsn, .. } if !self.heard.is_empty() => {
                let heard = std::mem::take(&mut self.heard);
                if Position::end(*end_lsn) > self.good { heard } else { Vec::new() }
            }
            _ => Vec::new(),
        }
    }
}

/// The command in a message; `None` if it is of another kind, as keepstep's own are.
fn read(content: &[u8]) -> Option<Result<Command, Unreadable>> {
    content.trim_ascii_start().first().filter(|byte| **byte == b'{')?;
    let message = match serde_json::from_slice(content) {
        Ok(message) => message,
        Err(error) => return Some(Err(Unreadable::Json { column: error.column() })),
    };
    let pass = |rules: Names, purpose| Command::Pass(PassRequest { rules: rules.into(), purpose, filter: None });
    Some(match message {
        Message::Warm { rule } => Ok(pass(rule, Purpose::Warm)),
        Message::Verify { rule, sample, repair } => match sample.as_deref().map_or(Ok(1.0), parse_sample) {
            Ok(sample) => Ok(pass(rule, Purpose::Verify { sample, repair })),
            Err(_) => Err(Unreadable::Sample),
        },
        Message::Reload {} => Ok(Command::Reload),
    })
}

impl Command {
    /// As `message_commands` lists it.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Pass(PassRequest { purpose: Purpose::Warm, .. }) => "warm",
            Command::Pass(PassRequest { purpose: Purpose::Verify { .. }, .. }) => "verify",
            Command::Reload => "reload",
        }
    }

    /// Whether a logical message may command it.
    pub fn is_obeyed(&self, listed: MessageCommands) -> bool {
        match self {
            Command::Pass(PassRequest { purpose: Purpose::Warm, .. }) => listed.warm,
            Command::Pass(PassRequest { purpose: Purpose::Verify { .. }, .. }) => listed.verify,
            Command::Reload => listed.reload,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::config::open::Table;
    use crate::config::{RulesFile, TableName, parse};
    use crate::model::Lsn;

    /// Rules 0 to 3: two on one table, one that is not warmed by itself, one that writes nothing.
    fn config() -> Config {
        let written = |name: &str, table: &str, more: &str| {
            format!(
                "[rule.{name}]\ntable = \"public.{table}\"\nkey = \"{name}:{{id}}\"\nvalue = \"json\"\n\
                 columns = [\"*\"]\n{more}"
            )
        };
        let text = [
            "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\n".to_owned(),
            written("product", "products", ""),
            written("title", "products", ""),
            written("order", "orders", "warm = false\n"),
            "[rule.lists]\ntable = \"public.products\"\ndelete = [\"lists\"]\n".to_owned(),
        ];
        parse(RulesFile { path: "keepstep.toml".into(), text: text.concat() }, &|_| None).unwrap().0
    }

    fn request(rules: &[&str], purpose: Purpose, filter: Option<&str>) -> PassRequest {
        let rules = rules.iter().map(|rule| (*rule).to_owned()).collect();
        PassRequest { rules, purpose, filter: filter.map(str::to_owned) }
    }

    fn ordered(request: &PassRequest) -> Result<Vec<u16>, String> {
        let order = request.order(&config(), Reports::channel().0);
        order.map(|order| order.rules).map_err(|error| format!("{error} {:?}", error.hints()))
    }

    const VERIFY: Purpose = Purpose::Verify { sample: 1.0, repair: false };

    #[test]
    fn rules_are_numbered_and_all_that_make_sense_without_names() {
        assert_eq!(ordered(&request(&["order", "product", "order"], Purpose::Warm, None)), Ok(vec![0, 2]));
        assert_eq!(ordered(&request(&[], Purpose::Warm, None)), Ok(vec![0, 1]));
        assert_eq!(ordered(&request(&[], VERIFY, None)), Ok(vec![0, 1, 2]));
        assert_eq!(ordered(&request(&[], Purpose::Warm, Some("id > 5"))), Ok(vec![0, 1]));
    }

    #[test]
    fn rules_that_cannot_be_meant_are_refused() {
        let refused = |request: PassRequest| ordered(&request).unwrap_err();
        assert!(refused(request(&["prodcut"], VERIFY, None)).contains("did you mean `product`?"));
        assert!(refused(request(&["lists"], VERIFY, None)).contains("writes no key"));
        assert!(refused(request(&["product", "order"], Purpose::Warm, Some("true"))).contains("one table"));
        let mut nothing = config();
        nothing.rules.retain(|rule| rule.write.is_none());
        for purpose in [Purpose::Warm, VERIFY] {
            assert!(request(&[], purpose, None).order(&nothing, Reports::channel().0).is_err());
        }
    }

    #[test]
    fn a_pattern_means_the_rules_that_were_made_of_it() {
        let text = "[postgres]\nurl = \"postgresql://db\"\n[redis]\nurl = \"redis://cache\"\n\
                    [rule.fixed]\ntable = \"public.f\"\nkey = \"f:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n\
                    [rule.item]\ntable = \"*.items\"\nkey = \"{_schema}:{id}\"\nvalue = \"json\"\ncolumns = [\"*\"]\n";
        let file = RulesFile { path: "keepstep.toml".into(), text: text.to_owned() };
        let open = parse(file, &|_| None).unwrap().0;
        let table = |schema: &str| Table {
            name: TableName { schema: schema.to_owned(), name: "items".to_owned() },
            primary_key: vec!["id".to_owned()],
        };
        let matched = open.with_tables(&[table("a"), table("b")]);
        let numbers = |config: &Config, rules: &[&str]| {
            let order = request(rules, VERIFY, None).order(config, Reports::channel().0);
            order.map(|order| order.rules).map_err(|error| error.to_string())
        };
        assert_eq!(numbers(&matched, &["item"]), Ok(vec![1, 2]));
        assert_eq!(numbers(&matched, &["item[b.items]"]), Ok(vec![2]));
        assert_eq!(numbers(&matched, &[]), Ok(vec![0, 1, 2]));
        assert!(numbers(&open, &["item"]).unwrap_err().contains("no table matches"));
    }

    #[test]
    fn a_request_is_read_from_the_target_that_it_writes() {
        let requests = [
            request(&[], Purpose::Warm, None),
            request(&["a", "b"], Purpose::Warm, Some("name = 'x & y' and price > 1.5 + 2")),
            request(&["a"], Purpose::Verify { sample: 0.25, repair: true }, None),
            request(&[], VERIFY, None),
        ];
        for request in requests {
            let target = request.target();
            let (path, query) = target.split_once('?').unwrap();
            let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8().unwrap().into_owned();
            let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
            let pairs: Vec<_> = pairs.map(|(name, value)| (decoded(name), decoded(value))).collect();
            let read = if path == "/warm" { PassRequest::warm(&pairs) } else { PassRequest::verify(&pairs) };
            assert_eq!(read.unwrap(), request, "{target}");
        }
    }

    #[test]
    fn parameters_that_are_not_known_or_make_no_sense_are_refused() {
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        for wrong in [&[("rules", "a")][..], &[("where", "true"), ("where", "false")], &[("sample", "1%")]] {
            assert!(PassRequest::warm(&pairs(wrong)).is_err(), "{wrong:?}");
        }
        for wrong in [("where", "true"), ("sample", "0%"), ("sample", "101%"), ("sample", "1"), ("repair", "maybe")] {
            assert!(PassRequest::verify(&pairs(&[wrong])).is_err(), "{wrong:?}");
        }
        for text in ["NaN%", "-1%", "%", "inf%", ""] {
            assert!(parse_sample(text).is_err(), "{text}");
        }
    }

    #[test]
    fn messages_are_commands_or_refused_or_of_another_kind() {
        let command = |content: &str| read(content.as_bytes());
        assert_eq!(
            command(r#"{"command": "warm", "rule": "product"}"#),
            Some(Ok(Command::Pass(request(&["product"], Purpose::Warm, None))))
        );
        assert_eq!(
            command(r#" {"rule": ["a", "b"], "sample": "50%", "repair": true, "command": "verify"}"#),
            Some(Ok(Command::Pass(request(&["a", "b"], Purpose::Verify { sample: 0.5, repair: true }, None))))
        );
        assert_eq!(command(r#"{"command":"reload"}"#), Some(Ok(Command::Reload)));
        for other in ["heartbeat", "", "warm", "[]"] {
            assert_eq!(command(other), None, "{other}");
        }
        let unreadable = [
            r#"{"command": "warm", "where": "true"}"#,
            r#"{"command": "reload", "rule": "a"}"#,
            r#"{"command": "flush"}"#,
            r#"{"command": "warm", "rule": 1}"#,
            r#"{"rule": "a"}"#,
            r#"{"command": "verify", "sample": "0%"}"#,
            "{",
            "{}{",
        ];
        for content in unreadable {
            assert!(matches!(command(content), Some(Err(_))), "{content}");
        }
    }

    #[test]
    fn only_listed_commands_are_obeyed() {
        let listed = MessageCommands { warm: true, ..MessageCommands::default() };
        let commands = [
            Command::Pass(request(&[], Purpose::Warm, None)),
            Command::Pass(request(&[], VERIFY, None)),
            Command::Reload,
        ];
        assert_eq!(commands.each_ref().map(|command| command.is_obeyed(listed)), [true, false, false]);
    }

    const WARM: &str = r#"{"command": "warm"}"#;

    fn message(transactional: bool, prefix: &'static str) -> Event<'static> {
        Event::Message { transactional, lsn: Lsn(150), prefix: prefix.as_bytes(), content: WARM.as_bytes() }
    }

    fn commit(end_lsn: u64) -> Event<'static> {
        Event::Commit { commit_lsn: Lsn(end_lsn - 10), end_lsn: Lsn(end_lsn) }
    }

    #[test]
    fn commands_are_obeyed_behind_their_commit_and_once() {
        let mut messages = Messages::new(Position::end(Lsn(100)));
        assert!(messages.hear(&message(true, "keepstep")).is_empty(), "not committed yet");
        assert_eq!(messages.hear(&commit(200)).len(), 1);
        assert!(messages.hear(&commit(300)).is_empty(), "said once");
        messages.hear(&message(false, "keepstep"));
        messages.hear(&message(true, "else"));
        assert!(messages.hear(&commit(400)).is_empty(), "not transactional, not ours");
        let mut again = Messages::new(Position::end(Lsn(200)));
        again.hear(&message(true, "keepstep"));
        assert!(again.hear(&commit(200)).is_empty(), "obeyed before the restart");
    }

    #[test]
    fn a_transaction_of_many_commands_ends_with_a_refusal() {
        let mut messages = Messages::new(Position::end(Lsn(0)));
        for _ in 0..1000 {
            messages.hear(&message(true, "keepstep"));
        }
        let heard = messages.hear(&commit(200));
        assert_eq!((heard.len(), heard.last()), (COMMANDS_MAX + 1, Some(&Err(Unreadable::TooMany))));
    }

    #[tokio::test]
    async fn reports_end_with_a_last_word_whatever_happens() {
        let progress = Report::Progress { rule: "product".to_owned(), rows: 1, rows_total: 2 };
        let (sender, mut reports) = Reports::channel();
        sender.send(progress.clone()).await.unwrap();
        drop(sender);
        assert_eq!(reports.next().await, Some(progress));
        assert!(matches!(reports.next().await, Some(Report::Failed { .. })));
        assert_eq!(reports.next().await, None);
    }

    #[test]
    fn reports_are_lines_of_json() {
        let difference = Report::Difference {
            rule: "product".to_owned(),
            key: "shop:product:1".to_owned(),
            kind: Kind::Differs,
            holds: Some("a\nb".to_owned()),
            should: None,
            repaired: false,
        };
        let line = serde_json::to_string(&difference).unwrap();
        assert_eq!(
            line,
            r#"{"report":"difference","rule":"product","key":"shop:product:1","kind":"differs","holds":"a\nb","should":null,"repaired":false}"#
        );
        assert_eq!(serde_json::from_str::<Report>(&line).unwrap(), difference);
        let done = serde_json::to_string(&Report::Done(Totals { rows: 7, ..Totals::default() })).unwrap();
        assert_eq!(done, r#"{"report":"done","rows":7,"checked":0,"diverged":0,"expired":0,"skipped":0}"#);
        for kind in [Kind::Missing, Kind::Differs, Kind::Orphan, Kind::Ttl] {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
        }
    }
}
