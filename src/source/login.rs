//! Start-up and authentication of the replication connection (the manual's "Message Flow", "SASL Authentication"), and
//! where passwords come from.
//!
//! The session's settings go out with start-up, after the URL's own `options`, so that neither the server's defaults
//! nor the URL decides how values are written (`process_startup_options` in `src/backend/utils/init/postinit.c`).

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bytes::BytesMut;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{self, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256};
use postgres_protocol::message::frontend;

use super::connect::{Failure, Login, Startup, Stream};
use super::conninfo::{Address, ChannelBinding, ConnInfo, Host};
use super::server_error::ServerError;
use super::wire::{Message, Wire, protocol, unexpected};
use crate::config::Secret;
use crate::error::{Error, ErrorKind};

/// What decides the text form of every value; the same on each connection.
pub(super) const VALUE_SETTINGS: [(&str, &str); 6] = [
    ("client_encoding", "UTF8"),
    ("TimeZone", "UTC"),
    ("DateStyle", "ISO"),
    ("IntervalStyle", "postgres"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
];

/// Groups and others have no business with a password file.
const PASSWORD_FILE_FORBIDDEN_MODE: u32 = 0o077;

/// Makes replication connections.
pub(super) struct ReplicationStartup;

/// A replication connection, ready for commands.
pub(super) struct Session {
    pub(super) wire: Wire,
    /// What the server reported of its settings.
    parameters: Vec<(String, String)>,
}

impl Startup for ReplicationStartup {
    type Session = Session;

    async fn start(&self, stream: Stream, login: &Login<'_>) -> Result<Session, Failure> {
        let mut handshake = Handshake { wire: Wire::new(stream), login };
        handshake.send(|out| frontend::startup_message(parameters(login.info), out)).await?;
        handshake.authenticate().await?;
        let parameters = handshake.reported_parameters().await?;
        handshake.wire.established();
        Ok(Session { wire: handshake.wire, parameters })
    }

    fn reported<'a>(session: &'a Session, parameter: &str) -> Option<&'a str> {
        session.parameters.iter().rev().find(|(name, _)| name == parameter).map(|(_, value)| value.as_str())
    }
}

fn parameters(info: &ConnInfo) -> impl Iterator<Item = (&str, &str)> {
    let own = [
        ("user", info.user.as_str()),
        ("database", &info.database),
        ("replication", "database"),
        ("application_name", &info.application_name),
    ];
    let options = info.options.as_deref().map(|options| ("options", options));
    own.into_iter().chain(options).chain(VALUE_SETTINGS)
}

struct Handshake<'a> {
    wire: Wire,
    login: &'a Login<'a>,
}

impl Handshake<'_> {
    async fn send(&mut self, write: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> Result<(), Failure> {
        let mut out = BytesMut::new();
        write(&mut out).map_err(|error| {
            Error::new(ErrorKind::Config, "the Postgres URL holds what cannot be sent").because(error)
        })?;
        self.wire.send(&out).await.map_err(|error| self.login.broken(error))
    }

    /// The next message that is no notice; an ErrorResponse is the end.
    async fn receive(&mut self) -> Result<Message, Failure> {
        loop {
            let message = self.wire.startup_message().await.map_err(|error| self.login.broken(error))??;
            match message.tag {
                b'E' => return Err(self.login.refused(ServerError::parse(self.wire.body(&message)))),
                b'N' => {}
                _ => return Ok(message),
            }
        }
    }

    /// The next authentication request: its code and its data.
    async fn request(&mut self) -> Result<(u32, Vec<u8>), Failure> {
        let message = self.receive().await?;
        match (message.tag, self.wire.body(&message).split_first_chunk::<4>()) {
            (b'R', Some((code, data))) => Ok((u32::from_be_bytes(*code), data.to_vec())),
            (tag, _) => Err(unexpected(tag, "during authentication").into()),
        }
    }

    async fn authenticate(&mut self) -> Result<(), Failure> {
        let (code, data) = self.request().await?;
        match code {
            10 => {
                self.scram(&data).await?;
            }
            0 => return self.without_binding(),
            3 => {
                self.without_binding()?;
                let password = self.password()?.expose().to_owned();
                self.send(|out| frontend::password_message(password.as_bytes(), out)).await?;
            }
            5 => {
                self.without_binding()?;
                let salt = data.try_into().map_err(|_| protocol("a salt that is not 4 bytes"))?;
                let user = self.login.info.user.as_bytes();
                let hash = md5_hash(user, self.password()?.expose().as_bytes(), salt);
                self.send(|out| frontend::password_message(hash.as_bytes(), out)).await?;
            }
            code => return Err(unsupported(&format!("number {code}")).into()),
        }
        match self.request().await? {
            (0, _) => Ok(()),
            (code, _) => Err(protocol(format!("authentication request {code} behind the password")).into()),
        }
    }

    /// SCRAM-SHA-256, bound to the TLS connection where both sides can (RFC 5802, RFC 5929).
    async fn scram(&mut self, mechanisms: &[u8]) -> Result<(), Failure> {
        let offered = |name: &str| mechanisms.split(|&byte| byte == 0).any(|offer| offer == name.as_bytes());
        let wanted = self.login.info.channel_binding != ChannelBinding::Disable;
        let binding = self.wire.binding().filter(|_| wanted);
        let (mechanism, binding) = match binding {
            Some(binding) if offered(SCRAM_SHA_256_PLUS) => {
                (SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(binding))
            }
            // Says that binding would have been possible, so that a server behind a man in the middle notices.
            Some(_) => (SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            None => (SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
        };
        if !offered(mechanism) {
            return Err(unsupported("a SASL mechanism other than SCRAM-SHA-256").into());
        }
        if mechanism == SCRAM_SHA_256 {
            self.without_binding()?;
        }
        let mut scram = ScramSha256::new(self.password()?.expose().as_bytes(), binding);
        self.send(|out| frontend::sasl_initial_response(mechanism, scram.message(), out)).await?;
        let first = self.sasl(11).await?;
        scram.update(&first).map_err(unproven)?;
        self.send(|out| frontend::sasl_response(scram.message(), out)).await?;
        let last = self.sasl(12).await?;
        scram.finish(&last).map_err(unproven)?;
        Ok(())
    }

    async fn sasl(&mut self, expected: u32) -> Result<Vec<u8>, Failure> {
        match self.request().await? {
            (code, data) if code == expected => Ok(data),
            (code, _) => Err(protocol(format!("authentication request {code} instead of {expected}")).into()),
        }
    }

    fn password(&self) -> Result<&Secret, Error> {
        self.login.password.as_ref().ok_or_else(|| {
            let message = format!("Postgres at {} asks for a password, and there is none", self.login.host);
            Error::new(ErrorKind::PostgresDenied, message)
                .hint(
                    "put it into `url` in [postgres]: postgresql://USER:${file:/run/secrets/pg_password}@HOST/DATABASE",
                )
                .hint("PGPASSWORD and a password file (PGPASSFILE, ~/.pgpass) are looked at too")
        })
    }

    /// This way of authentication is not bound to the TLS connection.
    fn without_binding(&self) -> Result<(), Failure> {
        if self.login.info.channel_binding != ChannelBinding::Require {
            return Ok(());
        }
        let message = format!("Postgres at {} does not bind authentication to TLS", self.login.host);
        Err(Error::new(ErrorKind::PostgresDenied, message)
            .hint("`channel_binding=require` needs TLS and a password stored as SCRAM-SHA-256")
            .into())
    }

    /// Everything up to ReadyForQuery.
    async fn reported_parameters(&mut self) -> Result<Vec<(String, String)>, Failure> {
        let mut parameters = Vec::new();
        loop {
            let message = self.receive().await?;
            match message.tag {
                b'S' => {
                    let mut texts = self.wire.body(&message).split(|&byte| byte == 0).map(String::from_utf8_lossy);
                    if let (Some(name), Some(value)) = (texts.next(), texts.next()) {
                        parameters.push((name.into_owned(), value.into_owned()));
                    }
                }
                b'K' => {}
                b'Z' => return Ok(parameters),
                tag => return Err(unexpected(tag, "during start-up").into()),
            }
        }
    }
}

fn unsupported(what: &str) -> Error {
    Error::new(
        ErrorKind::PostgresDenied,
        format!("Postgres asks for an authentication method that keepstep lacks: {what}"),
    )
    .hint("use scram-sha-256 or a client certificate in pg_hba.conf")
}

/// The server did not prove that it knows the password, or the exchange made no sense.
fn unproven(error: io::Error) -> Error {
    Error::new(ErrorKind::PostgresDenied, "SCRAM authentication failed").because(error)
}

/// The password for `host`: from the URL or the environment, else from the password file (the manual's "The Password
/// File").
pub(super) async fn password(info: &ConnInfo, host: &Host) -> Option<Secret> {
    if info.password.is_some() {
        return info.password.clone();
    }
    let path = info.password_file.as_deref()?;
    let text = read_password_file(path).await?;
    let name = match &host.address {
        Address::Tcp(name) => name.as_str(),
        Address::Unix(_) => "localhost",
    };
    let wanted = [name, &host.port.to_string(), &info.database, &info.user];
    text.lines().find_map(|line| password_of_line(line, &wanted)).map(Secret::new)
}

async fn read_password_file(path: &Path) -> Option<String> {
    let mode = tokio::fs::metadata(path).await.ok()?.permissions().mode();
    if mode & PASSWORD_FILE_FORBIDDEN_MODE != 0 {
        tracing::warn!(file = %path.display(), "the password file is ignored, because others may read it: chmod 0600");
        return None;
    }
    let read = tokio::fs::read_to_string(path).await;
    read.inspect_err(|error| tracing::warn!(file = %path.display(), %error, "the password file cannot be read")).ok()
}

/// `host:port:database:user:password`; `*` matches anything, `\` takes the next character as it is.
fn password_of_line(line: &str, wanted: &[&str; 4]) -> Option<String> {
    if line.starts_with('#') {
        return None;
    }
    let mut characters = line.chars();
    let mut field = |to_end: bool| {
        let mut text = String::new();
        loop {
            match characters.next() {
                Some('\\') => text.extend(characters.next()),
                Some(':') if !to_end => return Some(text),
                Some(character) => text.push(character),
                None => return to_end.then_some(text),
            }
        }
    };
    for wanted in wanted {
        let text = field(false)?;
        if text != "*" && text != *wanted {
            return None;
        }
    }
    field(true).filter(|password| !password.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn password_lines_match_as_in_libpq() {
        let wanted = ["db", "5432", "shop", "app"];
        let found = |line| password_of_line(line, &wanted);
        assert_eq!(found("db:5432:shop:app:secret").as_deref(), Some("secret"));
        assert_eq!(found("*:*:*:app:a\\:b\\\\c:d").as_deref(), Some("a:b\\c:d"));
        for line in ["other:5432:shop:app:secret", "db:5432:shop:app:", "db:5432:shop:app", "#*:*:*:*:x", "", "\\"] {
            assert_eq!(found(line), None, "{line}");
        }
    }
}
