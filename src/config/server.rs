//! `[postgres]`, `[redis]` and `[admin]`: the servers at both ends and the endpoint.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use super::code::Code;
use super::diagnostic::Diagnostic;
use super::mistake::Mistake;
use super::section::Section;
use super::{
    AdminConfig, MessageCommands, OnFull, OnGap, Outbox, PostgresConfig, RedisConfig, Secret, Source, Spanned, quantity,
};

const REPLAY_WINDOW: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_secs(1);
const HEARTBEAT: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_RETAINED_BYTES: u64 = 8 << 30;
const QUERY_CONNECTIONS: u64 = 2;
const REDIS_TIMEOUT: Duration = Duration::from_secs(10);
/// Every key is written once for each.
const ALSO_PREFIXES_MAX: usize = 8;
const BATCH_OPS: u64 = 4096;
const BATCH_BYTES: u64 = 4 << 20;
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9847);
/// NAMEDATALEN - 1 (`src/include/pg_config_manual.h`).
const IDENTIFIER_BYTES_MAX: usize = 63;

/// Reads `[postgres]`; `None` if its URL is missing or wrong.
pub(super) fn postgres(mut section: Section<'_, '_>) -> Option<PostgresConfig> {
    let url = section.parsed("url", postgres_url);
    let source = source(&mut section);
    let slot = section.parsed("slot", slot_name);
    let publication = section.parsed("publication", publication_name);
    let on_gap = section.choice("on_gap").map(|choice| match choice.value {
        "stop" => OnGap::Stop,
        _ => OnGap::Reconcile,
    });
    let replay_window = section.duration("replay_window");
    let heartbeat = section.duration_or_off("heartbeat");
    let connect_timeout = section.duration("connect_timeout");
    let max_retained = section.size("max_retained");
    let query_connections = section.count("query_connections").unwrap_or(QUERY_CONNECTIONS);
    let warm_rate = section.parsed("warm_rate", quantity::rows_per_second);
    let message_commands = message_commands(&mut section);
    section.finish();
    Some(PostgresConfig {
        url: url?.value,
        source,
        slot: slot.map_or_else(|| "keepstep".to_owned(), |slot| slot.value),
        publication: publication.map_or_else(|| "keepstep".to_owned(), |publication| publication.value),
        on_gap: on_gap.unwrap_or(OnGap::Reconcile),
        replay_window: replay_window.unwrap_or(REPLAY_WINDOW),
        heartbeat: heartbeat.map_or(Some(HEARTBEAT), |heartbeat| heartbeat.value),
        connect_timeout: connect_timeout.unwrap_or(CONNECT_TIMEOUT),
        max_retained: max_retained.unwrap_or(MAX_RETAINED_BYTES),
        query_connections: usize::try_from(query_connections).ok()?,
        warm_rate: warm_rate.and_then(|rate| rate.value),
        message_commands,
    })
}

/// The fields of the outbox mean nothing without it.
fn source(section: &mut Section<'_, '_>) -> Source {
    let is_outbox = section.choice("source").is_some_and(|choice| choice.value == "outbox");
    let poll_interval = section.duration("poll_interval").unwrap_or(POLL_INTERVAL);
    let notify = section.flag("notify").unwrap_or(true);
    let on_full = section.choice("on_full").map_or(OnFull::Gap, |choice| match choice.value {
        "keep" => OnFull::Keep,
        _ => OnFull::Gap,
    });
    if is_outbox {
        return Source::Outbox(Outbox { poll_interval, notify, on_full });
    }
    for name in ["poll_interval", "notify", "on_full"] {
        if let Some(span) = section.given(name) {
            let problem = format!("`{name}` is for `source = \"outbox\"` alone");
            let wrong = section.error(Code::Excluded, problem, span, "means nothing here");
            section.report(wrong.help("remove it, or write:  source = \"outbox\""));
        }
    }
    Source::Replication
}

fn message_commands(section: &mut Section<'_, '_>) -> MessageCommands {
    let listed = section.choices("message_commands").map_or_else(Vec::new, |commands| commands.value);
    let named = |name| listed.iter().any(|command| command.value == name);
    MessageCommands { warm: named("warm"), verify: named("verify"), reload: named("reload") }
}

/// Reads `[redis]`; `None` if its URL is missing or wrong.
pub(super) fn redis(mut section: Section<'_, '_>) -> Option<RedisConfig> {
    let url = section.parsed("url", redis_url);
    let prefix = section.text("prefix").map(owned);
    let also_prefix = also_prefix(&mut section, prefix.as_ref());
    let timeout = section.duration("timeout");
    let wait_replicas = section.count("wait_replicas").and_then(|count| u32::try_from(count).ok());
    let ca_file = section.parsed("ca_file", path);
    let certificate = section.parsed("client_cert", path);
    let key = section.parsed("client_key", path);
    let batch_ops = section.count("batch_ops").unwrap_or(BATCH_OPS);
    let batch_bytes = section.size("batch_bytes").unwrap_or(BATCH_BYTES);
    if let Some(url) = &url {
        warn_without_tls(&mut section, url);
    }
    section.finish();
    Some(RedisConfig {
        url: url?.value,
        prefix: prefix.map(|prefix| prefix.value).unwrap_or_default(),
        also_prefix,
        timeout: timeout.unwrap_or(REDIS_TIMEOUT),
        wait_replicas: wait_replicas.unwrap_or(0),
        ca_file: ca_file.map(|file| file.value),
        client_certificate: certificate.map(|file| file.value).zip(key.map(|file| file.value)),
        batch_ops: usize::try_from(batch_ops).ok()?,
        batch_bytes: usize::try_from(batch_bytes).ok()?,
    })
}

fn owned(text: Spanned<Cow<'_, str>>) -> Spanned<String> {
    Spanned { value: text.value.into_owned(), span: text.span }
}

/// Reads `also_prefix`. No prefix may begin with another one, or keys under it would count as keys under the other too.
fn also_prefix(section: &mut Section<'_, '_>, prefix: Option<&Spanned<String>>) -> Vec<String> {
    let Some(also) = section.list("also_prefix", |text| Ok(text.to_owned())) else { return Vec::new() };
    if also.value.len() > ALSO_PREFIXES_MAX {
        let many = section.error(
            Code::Prefixes,
            "too many prefixes",
            also.span.clone(),
            format!("more than {ALSO_PREFIXES_MAX}"),
        );
        section.report(many.help("each of them costs as much in Redis as the first"));
    }
    let unnamed = Spanned { value: String::new(), span: section.header.clone() };
    let mut others = vec![prefix.unwrap_or(&unnamed)];
    for one in &also.value {
        if let Some(other) = others.iter().find(|other| one.value.starts_with(&other.value)) {
            let problem = prefix_within(section, one, other);
            section.report(problem);
        } else if let Some(other) = others.iter().find(|other| other.value.starts_with(&one.value)) {
            let problem = prefix_within(section, other, one);
            section.report(problem);
        }
        others.push(one);
    }
    also.value.iter().map(|prefix| prefix.value.clone()).collect()
}

fn prefix_within(section: &Section<'_, '_>, longer: &Spanned<String>, shorter: &Spanned<String>) -> Diagnostic {
    let title = format!("the prefix \"{}\" begins with the prefix \"{}\"", longer.value, shorter.value);
    let help = match shorter.value.as_str() {
        "" => "every key begins with the empty one: give each a text of its own, as \"shop:v1:\"",
        _ => "let them differ before the shorter one ends, as \"shop:v1:\" and \"shop:v0:\" do",
    };
    section
        .error(
            Code::Prefixes,
            title,
            longer.span.clone(),
            "keys under this one would be taken for keys under the other",
        )
        .context(shorter.span.clone(), "the other")
        .help(help)
}

/// Certificates do nothing on a connection without TLS, and somebody believes that they do.
fn warn_without_tls(section: &mut Section<'_, '_>, url: &Spanned<Secret>) {
    if url.value.expose().starts_with("rediss://") {
        return;
    }
    for name in ["ca_file", "client_cert", "client_key"] {
        if let Some(span) = section.given(name) {
            let title = format!("{}: `{name}` has no effect, because the connection is not encrypted", section.title);
            let warning =
                Diagnostic::warning(Code::NoTls, title, span, "").context(url.span.clone(), "not `rediss://`");
            section.report(warning.help("use a `rediss://` URL"));
        }
    }
}

/// Reads `[admin]`.
pub(super) fn admin(mut section: Section<'_, '_>) -> AdminConfig {
    let listen = section.parsed("listen", address);
    let token = section.parsed("token", |text| match text {
        "" => Err(Mistake::whole(Code::Empty, text, "is empty").help("leave it out, and only loopback is answered")),
        _ => Ok(Secret::new(text)),
    });
    section.finish();
    AdminConfig { listen: listen.map_or(Some(LISTEN), |listen| listen.value), token: token.map(|token| token.value) }
}

impl Default for AdminConfig {
    fn default() -> Self {
        AdminConfig { listen: Some(LISTEN), token: None }
    }
}

/// The scheme of a URL and what follows `://`. Only what can be a scheme counts: the rest may be a secret.
fn split_scheme(url: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = url.split_once("://")?;
    let plain = scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+.-:".contains(&byte));
    (plain && scheme.len() <= 32).then_some((scheme, rest))
}

/// A URL whose scheme names Postgres, without the driver that SQLAlchemy and others write behind it.
fn postgres_url(text: &str) -> Result<Secret, Mistake> {
    const HELP: &str = "write it like:  postgresql://user:password@host:5432/database";
    let Some((scheme, rest)) = split_scheme(text) else {
        return Err(not_a_url(text, HELP));
    };
    match scheme.split('+').next() {
        Some("postgres" | "postgresql") => Ok(Secret::new(format!("postgresql://{rest}"))),
        _ => Err(wrong_scheme(scheme, "Postgres").help(HELP)),
    }
}

/// A URL whose scheme names a Redis that this version can talk to.
fn redis_url(text: &str) -> Result<Secret, Mistake> {
    const HELP: &str = "write it like:  redis://host:6379/0, rediss://user:password@host:6379/0 (with TLS) or \
                        redis+unix:///run/redis/redis.sock";
    let Some((scheme, rest)) = split_scheme(text) else {
        return Err(not_a_url(text, HELP));
    };
    match scheme {
        "redis" | "rediss" | "redis+unix" => Ok(Secret::new(text)),
        "unix" => Ok(Secret::new(format!("redis+unix://{rest}"))),
        "redis+sentinel" | "redis+cluster" => {
            let problem = format!("names a topology that is not available in this version yet: `{scheme}`");
            let range = 0..scheme.len();
            let mistake = Mistake { range, ..Mistake::whole(Code::NotYet, text, problem) };
            Err(mistake.help("name the primary itself:  redis://host:6379/0"))
        }
        _ => Err(wrong_scheme(scheme, "Redis").help(HELP)),
    }
}

fn not_a_url(text: &str, help: &str) -> Mistake {
    let problem = if text.is_empty() { "is empty" } else { "is not a URL" };
    Mistake::whole(Code::Url, text, problem).help(help)
}

fn wrong_scheme(scheme: &str, server: &str) -> Mistake {
    let range: Range<usize> = 0..scheme.len();
    Mistake { range, ..Mistake::whole(Code::Url, "", format!("is no URL of {server}: its scheme is `{scheme}`")) }
}

/// A name that Postgres takes for a slot (`ReplicationSlotValidateName` in `src/backend/replication/slot.c`).
fn slot_name(text: &str) -> Result<String, Mistake> {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let mistake = Mistake::whole(Code::PostgresName, text, "is not a name that Postgres takes for a slot");
    let wrong = text.char_indices().find(|(_, c)| !allowed(*c));
    if let Some((at, c)) = wrong {
        let mistake = Mistake { range: at..at + c.len_utf8(), ..mistake };
        return Err(mistake.help("slot names are made of lower-case letters, digits and `_`"));
    }
    match text.len() {
        0 => Err(mistake.label("empty")),
        1..=IDENTIFIER_BYTES_MAX => Ok(text.to_owned()),
        _ => Err(mistake.label(format!("longer than {IDENTIFIER_BYTES_MAX} bytes"))),
    }
}

fn publication_name(text: &str) -> Result<String, Mistake> {
    let mistake = Mistake::whole(Code::PostgresName, text, "is not a name that Postgres takes for a publication");
    match text.len() {
        0 => Err(mistake.label("empty")),
        1..=IDENTIFIER_BYTES_MAX => Ok(text.to_owned()),
        _ => Err(mistake.label(format!("longer than {IDENTIFIER_BYTES_MAX} bytes"))),
    }
}

fn path(text: &str) -> Result<PathBuf, Mistake> {
    if text.is_empty() { Err(Mistake::whole(Code::Empty, text, "is empty")) } else { Ok(PathBuf::from(text)) }
}

/// An IP address and a port, or `off`.
fn address(text: &str) -> Result<Option<SocketAddr>, Mistake> {
    if text == "off" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        let port = text.rsplit(':').next().and_then(|port| port.parse::<u16>().ok()).unwrap_or(LISTEN.port());
        Mistake::whole(Code::Listen, text, "is not an IP address with a port")
            .help(format!("write:  listen = \"127.0.0.1:{port}\"  for this machine alone"))
            .help(format!("or:  listen = \"0.0.0.0:{port}\"  for every address, or \"off\""))
    })
}
