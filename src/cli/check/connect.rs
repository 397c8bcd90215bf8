//! The servers' half of `keepstep check`: each question once, with an answer that names the fix.

use std::collections::BTreeSet;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use tokio_postgres::Client;

use crate::cache::inspect;
use crate::catalog::{self, Carrier, Checked};
use crate::config::diagnostic::Severity;
use crate::config::{Config, Rule, Source, TableName, Value};
use crate::decode::types::Types;
use crate::error::{Error, ErrorKind};
use crate::query::check::check_queries;
use crate::rules::pattern::Pattern;
use crate::source::client;
use crate::source::conninfo::ConnInfo;
use crate::source::provision::{Executor, outbox, plan_setup};
use crate::source::query_error;
use crate::source::replication::Walsender;
use crate::source::slot;

use super::super::Output;
use super::super::setup::{wanted, wanted_outbox};
use super::show;

/// No query of a check may take longer.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(15);
/// No more keys are looked at; a larger cache is judged by these.
const KEYS_MAX: usize = 100_000;
/// The oldest Postgres whose pgoutput has logical messages.
const POSTGRES_MIN: i32 = 140_000;
/// How many keys of a rule are shown.
const SAMPLES: usize = 3;

/// One answer.
#[derive(Debug, Serialize)]
struct Answer {
    verdict: Verdict,
    what: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hints: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warning,
    Failed,
}

impl Answer {
    fn ok(what: impl Into<String>) -> Self {
        Answer { verdict: Verdict::Ok, what: what.into(), hints: Vec::new() }
    }

    fn warning(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Answer { verdict: Verdict::Warning, what: what.into(), hints: vec![hint.into()] }
    }

    fn failed(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Answer { verdict: Verdict::Failed, what: what.into(), hints: vec![hint.into()] }
    }

    fn error(error: &Error) -> Self {
        Answer { verdict: Verdict::Failed, what: error.to_string(), hints: error.hints().to_vec() }
    }
}

/// Asks both servers everything, and prints the answers.
pub(super) async fn check(config: &Config, output: Output) -> Result<ExitCode> {
    let mut config = config.clone();
    let (mut answers, checked) = postgres(&mut config).await;
    let config = &config;
    answers.extend(redis(config, checked.as_ref()).await);
    let problems = checked.map(|checked| checked.diagnostics).unwrap_or_default();
    eprint!("{}", show(&problems, config));
    print(&answers, output)?;
    let unfit = problems.iter().any(|problem| problem.severity == Severity::Error);
    let failed = answers.iter().any(|answer| answer.verdict == Verdict::Failed);
    Ok(match (unfit, failed) {
        (true, _) => ExitCode::from(ErrorKind::Config.exit_code()),
        (false, true) => ExitCode::FAILURE,
        (false, false) => ExitCode::SUCCESS,
    })
}

fn print(answers: &[Answer], output: Output) -> Result<()> {
    let mut out = std::io::stdout().lock();
    if output == Output::Json {
        writeln!(out, "{}", serde_json::to_string(answers)?)?;
        return Ok(());
    }
    for Answer { verdict, what, hints } in answers {
        let verdict = match verdict {
            Verdict::Ok => "ok     ",
            Verdict::Warning => "warning",
            Verdict::Failed => "failed ",
        };
        writeln!(out, "{verdict}  {what}")?;
        hints.iter().try_for_each(|hint| writeln!(out, "         hint: {hint}"))?;
    }
    Ok(())
}

/// Postgres, and the rules bound to its tables if it answers; then those of patterns are among them.
async fn postgres(config: &mut Config) -> (Vec<Answer>, Option<Checked>) {
    let mut answers = Vec::new();
    match ask_postgres(config, &mut answers).await {
        Ok(checked) => (answers, Some(checked)),
        Err(error) => {
            answers.push(Answer::error(&error));
            (answers, None)
        }
    }
}

async fn ask_postgres(config: &mut Config, answers: &mut Vec<Answer>) -> Result<Checked, Error> {
    let info = ConnInfo::from_config(&config.postgres)?;
    if !info.dropped.is_empty() {
        let dropped = format!("`[postgres] url` has parameters that mean nothing here: {}", info.dropped.join(", "));
        answers.push(Answer::warning(dropped, "they are ignored"));
    }
    let client = client::connect(&info, STATEMENT_TIMEOUT).await?;
    answers.push(version(&client).await?);
    *config = catalog::with_tables(&client, config).await?;
    let config = &*config;
    answers.extend(provisioned(config, &client).await);
    if config.postgres.source == Source::Replication {
        answers.push(streaming(&info).await);
        answers.extend(slot_answer(config, &client).await?);
    }
    let names: BTreeSet<TableName> = config.rules.iter().map(|rule| rule.table.value.clone()).collect();
    let names: Vec<TableName> = names.into_iter().collect();
    let catalog = catalog::load(&client, &Carrier::of(&config.postgres), &names).await?;
    let types = Types::load(&client, &catalog.type_oids()).await?;
    let mut checked = catalog::check_rules(config, &catalog, &types);
    let queries = check_queries(&client, config, &checked).await?;
    checked.diagnostics.extend(queries);
    let (bound, rules) = (checked.rules.iter().flatten().count(), checked.rules.len());
    answers.push(match bound == rules {
        true => Answer::ok(format!("the tables fit: {bound} of {rules} rules")),
        false => Answer::failed(format!("the tables fit: {bound} of {rules} rules"), "see the messages above"),
    });
    Ok(checked)
}

async fn version(client: &Client) -> Result<Answer, Error> {
    let sql = "select current_setting('server_version'), current_setting('server_version_num')::int";
    let row = client.query_one(sql, &[]).await.map_err(|error| query_error("cannot ask for the version", error))?;
    let shown = format!("Postgres {}", row.get::<_, String>(0));
    Ok(match row.get::<_, i32>(1) >= POSTGRES_MIN {
        true => Answer::ok(shown),
        false => Answer::failed(format!("{shown} is too old"), "Postgres 14 and later are supported"),
    })
}

/// What setup would still have to do, or what would keep it from that.
async fn provisioned(config: &Config, client: &Client) -> Vec<Answer> {
    let (plan, there) = match &config.postgres.source {
        Source::Replication => {
            (plan_setup(client, &wanted(config, false), Executor::Role).await, "publication and slot are there")
        }
        Source::Outbox(settings) => {
            let plan = match wanted_outbox(client, config, settings).await {
                // A role that only reads is enough to run: what it may not do is no matter here.
                Ok(wanted) => outbox::plan_setup(client, &wanted, Executor::Dba).await,
                Err(error) => Err(vec![error]),
            };
            (plan, "the outbox is there, and its triggers are on every table")
        }
    };
    match plan {
        Ok(plan) if plan.statements.is_empty() => vec![Answer::ok(there)],
        Ok(plan) => {
            let steps = plan.statements.iter().map(|step| step.purpose.as_str()).collect::<Vec<_>>().join("; ");
            vec![Answer::failed(format!("not set up yet: {steps}"), "`keepstep setup` does it; with --print, the SQL")]
        }
        Err(obstacles) => obstacles.iter().map(Answer::error).collect(),
    }
}

/// Whether a replication connection works: a role without REPLICATION, pg_hba.conf or a pooler can stand in the way.
async fn streaming(info: &ConnInfo) -> Answer {
    let identify = async { Walsender::connect(info).await?.identify_system().await };
    match identify.await {
        Ok(identity) => Answer::ok(format!("replication connections work; database {}", identity.database)),
        Err(error) => {
            let mut answer = Answer::error(&error);
            answer
                .hints
                .push("poolers: PgBouncer passes replication connections from 1.23 on; else connect directly".into());
            answer
        }
    }
}

/// How much the slot holds back, if there is one.
async fn slot_answer(config: &Config, client: &Client) -> Result<Option<Answer>, Error> {
    let Some(slot) = slot::slot_state(client, &config.postgres.slot).await? else { return Ok(None) };
    let use_now = slot.active_pid.map_or_else(|| "not in use".to_owned(), |pid| format!("in use by PID {pid}"));
    let retained = slot.retained_bytes.unwrap_or_default();
    let shown = format!("slot `{}` keeps {retained} bytes of WAL, {use_now}", slot.name);
    Ok(Some(match retained > config.postgres.max_retained {
        true => {
            Answer::warning(shown, "more than `max_retained`: run keepstep, or drop the slot before the disk is full")
        }
        false => Answer::ok(shown),
    }))
}

async fn redis(config: &Config, checked: Option<&Checked>) -> Vec<Answer> {
    let mut answers = Vec::new();
    if let Err(error) = ask_redis(config, checked, &mut answers).await {
        answers.push(Answer::error(&error));
        answers.push(Answer::warning("the ACL that keepstep needs", inspect::acl_line(config)));
    }
    answers
}

async fn ask_redis(config: &Config, checked: Option<&Checked>, answers: &mut Vec<Answer>) -> Result<(), Error> {
    let facts = inspect::facts(&config.redis).await?;
    let shown = format!("{} {}", facts.product, facts.version);
    answers.push(match facts.is_supported() {
        true => Answer::ok(shown),
        false => Answer::failed(format!("{shown} is too old"), "Redis 6.2, Valkey 7.2 and later are supported"),
    });
    if facts.is_cluster {
        answers.push(Answer::failed("it is a node of a Cluster", "this version writes to a standalone server"));
    }
    if !facts.is_primary {
        answers.push(Answer::failed("it is a replica", "name the primary in `[redis] url`"));
    }
    let has_members = |rule: &Rule| {
        let write = rule.write.as_ref();
        rule.has_tags() || write.is_some_and(|write| matches!(write.value, Value::Member { .. }))
    };
    let has_members = config.rules.iter().any(has_members);
    answers.push(match (facts.maxmemory, facts.eviction.as_str()) {
        (0, _) => Answer::ok("no memory limit (maxmemory 0)"),
        (_, policy) if policy.starts_with("allkeys") && has_members => Answer::failed(
            format!("maxmemory-policy {policy} may evict a set, which would come back with some of its members only"),
            "CONFIG SET maxmemory-policy volatile-lru, or leave out the rules with `set` and `zset` values, and tags",
        ),
        (_, policy) if policy.starts_with("allkeys") => Answer::warning(
            format!(
                "maxmemory-policy {policy} may evict any key, the checkpoint too, which then counts as a lost cache"
            ),
            "CONFIG SET maxmemory-policy volatile-lru, and give the rules a `ttl`",
        ),
        (_, policy) => Answer::ok(format!("maxmemory-policy {policy}")),
    });
    if !facts.append_only {
        let hint = "appendonly yes keeps it over a restart; without it a restart of Redis is a gap";
        answers.push(Answer::warning("Redis keeps no append-only file", hint));
    }
    inspect::try_commands(config).await?;
    answers.push(Answer::ok("every command that keepstep sends is allowed"));
    if let Some(checked) = checked {
        let keys = inspect::keys(&config.redis, KEYS_MAX).await?;
        answers.extend(claims(config, checked, &keys));
    }
    Ok(())
}

/// How many of the keys that are there each template claims, with samples: a template that claims an application's
/// keys shows here.
fn claims(config: &Config, checked: &Checked, keys: &[Vec<u8>]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for bound in checked.rules.iter().flatten() {
        let rule = &config.rules[usize::from(bound.rule)].name.value;
        let written = bound.write.iter().map(|write| (&write.key, write.is_owner()));
        // What is only deleted may be anybody's.
        let deleted = bound.deletes().map(|key| (key, true));
        for (key, is_owner) in written.chain(deleted) {
            let claimed = claimed(rule, &key.pattern, keys);
            answers.push(match is_owner {
                true => Answer::ok(claimed),
                false => Answer::warning(
                    format!("{claimed}; a text in them can be anything, so those that no row has are not searched for"),
                    "if nobody else makes such keys:  owns = true; or put a digest into the key: {column|md5}",
                ),
            });
        }
    }
    answers
}

/// How many keys it is, and what they look like.
fn claimed(rule: &str, pattern: &Pattern, keys: &[Vec<u8>]) -> String {
    let claimed: Vec<_> = keys.iter().filter(|key| pattern.matches(key)).collect();
    let samples = claimed.iter().take(SAMPLES).map(|key| String::from_utf8_lossy(key).into_owned());
    let samples = samples.collect::<Vec<_>>().join(", ");
    let among = if samples.is_empty() { String::new() } else { format!(", as {samples}") };
    format!("rule `{rule}` owns {} keys like {pattern}{among}", claimed.len())
}
