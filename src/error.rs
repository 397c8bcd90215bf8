//! The one error of everything that does I/O: what kind it is, what happened, what to do about it.
//!
//! [`ErrorKind`] is the only place that says whether a failure is tried again or ends the daemon, and with which
//! exit code.

use std::error::Error as StdError;
use std::fmt;

/// What sort of failure it is, which decides what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The rules file, the environment or the tables do not fit together.
    Config,
    /// The command line makes no sense.
    Usage,
    /// History is missing: what changed in between cannot be known any more.
    Gap,
    /// Slot, cache and database do not belong together.
    Identity,
    /// Postgres cannot be reached, is starting up, or ended the connection.
    PostgresAway,
    /// Postgres refuses: authentication, privileges, settings.
    PostgresDenied,
    /// Redis cannot be reached, is loading, is not the primary, or ended the connection.
    RedisAway,
    /// Redis refuses: authentication, ACL, an unusable configuration.
    RedisDenied,
    /// Redis holds an older state than it acknowledged. The next session finds out whether the slot bridges it.
    CacheWentBack,
    /// Another daemon writes this cache now.
    Fenced,
    /// A server sent what its protocol does not allow.
    Protocol,
    /// Files, sockets and processes of this machine.
    Io,
}

impl ErrorKind {
    /// Whether the same thing may go well later, with nothing changed by hand.
    pub fn is_transient(self) -> bool {
        match self {
            Self::PostgresAway | Self::RedisAway | Self::CacheWentBack | Self::Fenced => true,
            Self::Config | Self::Usage | Self::Gap | Self::Identity | Self::PostgresDenied => false,
            Self::RedisDenied | Self::Protocol | Self::Io => false,
        }
    }

    /// The exit code of a command that ends with it (1 failed, 2 usage, 78 bad configuration).
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Config => 78,
            Self::Usage => 2,
            _ => 1,
        }
    }
}

/// A failure, with everything a person needs to end it. Never holds secrets or row values.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hints: Vec<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// A failure of this kind; `message` says what happened, in one sentence without a full stop.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), hints: Vec::new(), source: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds what caused it; shown behind the message.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What to do about it, most likely remedy first.
    pub fn hints(&self) -> &[String] {
        &self.hints
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut source = self.source.as_deref().map(|source| source as &dyn StdError);
        while let Some(cause) = source {
            write!(f, ": {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl StdError for Error {}

/// The result of everything that does I/O.
pub type Result<T, E = Error> = std::result::Result<T, E>;
