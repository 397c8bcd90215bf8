//! What Postgres says when it refuses, and what that means here: the one table from SQLSTATE to [`ErrorKind`] and hint.
//!
//! The decision never rests on the message, which follows the server's `lc_messages`.
//! Codes: the manual's appendix "PostgreSQL Error Codes".

use crate::error::{Error, ErrorKind};

/// `invalid_authorization_specification`: no pg_hba.conf entry, no such role, no valid client certificate.
pub(super) const INVALID_AUTHORIZATION: &str = "28000";
/// `object_not_in_prerequisite_state`: among others a slot that lost its WAL, and `wal_level` below logical.
pub(super) const NOT_IN_PREREQUISITE_STATE: &str = "55000";
/// `object_in_use`: another walsender holds the slot.
pub(super) const OBJECT_IN_USE: &str = "55006";
/// `undefined_object`: no such slot, publication or role.
pub(super) const UNDEFINED_OBJECT: &str = "42704";
/// `insufficient_privilege`
const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// An ErrorResponse, without the fields that can hold row values.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ServerError {
    /// Five characters that say what it is.
    pub(super) sqlstate: String,
    /// The sentence for people, in the server's language.
    message: String,
    /// More of it; kept only where it speaks of objects and settings (see [`detail_is_harmless`]).
    detail: Option<String>,
    /// Postgres's own advice.
    hint: Option<String>,
}

impl ServerError {
    /// From the body of an ErrorResponse ("Error and Notice Message Fields" in the protocol's chapter). Never fails:
    /// what is missing stays empty.
    pub(super) fn parse(body: &[u8]) -> Self {
        let mut error = ServerError::default();
        for field in body.split(|&byte| byte == 0) {
            let Some((code, text)) = field.split_first() else { break };
            let text = String::from_utf8_lossy(text).into_owned();
            match code {
                b'C' => error.sqlstate = text,
                b'M' => error.message = text,
                b'D' => error.detail = Some(text),
                b'H' => error.hint = Some(text),
                _ => {}
            }
        }
        error.without_row_values()
    }

    /// The same from tokio-postgres.
    pub(super) fn from_client(error: &tokio_postgres::error::DbError) -> Self {
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let error = ServerError {
            sqlstate: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: owned(error.detail()),
            hint: owned(error.hint()),
        };
        error.without_row_values()
    }

    fn without_row_values(mut self) -> Self {
        self.detail = self.detail.filter(|_| detail_is_harmless(&self.sqlstate));
        // A data exception's message itself quotes the value; 22023 is about parameters.
        if self.sqlstate.starts_with("22") && self.sqlstate != "22023" {
            self.message = "a value is not as it must be".to_owned();
        }
        self
    }

    /// The failure it stands for; `doing` says what was tried, as in `cannot start streaming`.
    pub(super) fn into_error(self, doing: &str) -> Error {
        let detail = self.detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
        let message = format!("{doing}: {}{detail} [SQLSTATE {}]", self.message, self.sqlstate);
        let error = Error::new(kind(&self.sqlstate), message);
        let error = hints(&self.sqlstate).iter().fold(error, |error, hint| error.hint(*hint));
        match self.hint {
            Some(hint) => error.hint(format!("Postgres says: {hint}")),
            None => error,
        }
    }
}

/// Whether details of this class speak of objects and settings only. Those of classes 22 and 23 quote row values.
fn detail_is_harmless(sqlstate: &str) -> bool {
    ["08", "28", "53", "55", "57"].iter().any(|class| sqlstate.starts_with(class)) || sqlstate == INSUFFICIENT_PRIVILEGE
}

/// Whether it may pass by itself. 57P04 (the database was dropped) does not, the rest of its class does: shutting down,
/// starting up, crashed, a statement timeout. 53: out of connections, memory or disk. 40, 55P03, 55006: somebody else
/// holds it just now.
fn kind(sqlstate: &str) -> ErrorKind {
    const TRANSIENT_CLASSES: [&str; 5] = ["08", "40", "53", "57", "58"];
    // 25P03: somebody was idle in a transaction for longer than the server allows.
    const TRANSIENT: [&str; 3] = [OBJECT_IN_USE, "55P03", "25P03"];
    match sqlstate {
        "57P04" => ErrorKind::PostgresDenied,
        "08P01" => ErrorKind::Protocol,
        _ if TRANSIENT.contains(&sqlstate) => ErrorKind::PostgresAway,
        _ if TRANSIENT_CLASSES.iter().any(|class| sqlstate.starts_with(class)) => ErrorKind::PostgresAway,
        _ => ErrorKind::PostgresDenied,
    }
}

/// What to do about it.
fn hints(sqlstate: &str) -> &'static [&'static str] {
    match sqlstate {
        "28P01" => &["check user and password of `url` in [postgres]"],
        INVALID_AUTHORIZATION => &[
            "pg_hba.conf must let this role in, with a line such as \
             `hostssl DATABASE ROLE ADDRESS scram-sha-256` (logical replication is matched by the database's own name, \
             not by `replication`), followed by `SELECT pg_reload_conf();`",
            "the role must exist and have LOGIN",
        ],
        INSUFFICIENT_PRIVILEGE => {
            &["the role needs REPLICATION (`ALTER ROLE name REPLICATION;`; Amazon RDS and Aurora: \
             `GRANT rds_replication TO name;`) and SELECT on the tables; sql/role.sql makes such a role"]
        }
        "3D000" => &["the URL's path must name the database that holds the tables"],
        "53300" => &["raise max_connections or max_wal_senders, or look for connections that nobody uses any more"],
        "25006" => {
            &["this is a standby or a read-only session; add `target_session_attrs=primary` and list every host"]
        }
        _ => &[],
    }
}

/// The failure of an ordinary query; `doing` says what was tried, as in `cannot read the catalog`.
pub fn query_error(doing: &str, error: tokio_postgres::Error) -> Error {
    if let Some(server) = error.as_db_error() {
        return ServerError::from_client(server).into_error(doing);
    }
    let cut = error.is_closed() || std::error::Error::source(&error).is_some_and(|cause| cause.is::<std::io::Error>());
    let kind = if cut { ErrorKind::PostgresAway } else { ErrorKind::Protocol };
    Error::new(kind, doing).because(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_and_row_values_left_out() {
        let body = b"SERROR\0VERROR\0C23505\0Mduplicate key\0DKey (email)=(secret@example.org) exists.\0\0";
        let error = ServerError::parse(body).into_error("cannot insert");
        assert_eq!(error.to_string(), "cannot insert: duplicate key [SQLSTATE 23505]");
        let body = b"C22P02\0Minvalid input syntax for type integer: \"secret\"\0\0";
        let error = ServerError::parse(body).into_error("cannot stream");
        assert_eq!(error.to_string(), "cannot stream: a value is not as it must be [SQLSTATE 22P02]");
        let body = b"C55000\0Mcannot read from slot\0DIt exceeded the maximum reserved size.\0\0";
        let error = ServerError::parse(body).into_error("cannot start");
        assert!(error.to_string().contains("maximum reserved size"), "{error}");
    }

    #[test]
    fn any_bytes_make_an_error() {
        for body in [&b""[..], b"\0", b"M", b"Cx\0M\xff\xfe"] {
            ServerError::parse(body).into_error("cannot ask");
        }
    }

    #[test]
    fn what_passes_by_itself_is_transient() {
        for sqlstate in ["57P01", "57P02", "57P03", "08006", "53300", "55006", "55P03", "57014", "25P03"] {
            assert!(kind(sqlstate).is_transient(), "{sqlstate}");
        }
        for sqlstate in ["28P01", "28000", "42501", "3D000", "57P04", "42704", "55000", "XX000", ""] {
            assert!(!kind(sqlstate).is_transient(), "{sqlstate}");
        }
    }
}
