//! Which transactions are visible now: see [`Snapshot`].

use tokio_postgres::Client;

use crate::error::{Error, ErrorKind, Result};
pub use crate::model::Snapshot;
use crate::source::query_error;

/// Takes a snapshot.
///
/// # Errors
/// [`ErrorKind::PostgresAway`] when the connection breaks.
pub async fn look(client: &Client) -> Result<Snapshot> {
    let doing = "cannot take a snapshot";
    let row = client.query_typed_one("select pg_current_snapshot()::text", &[]).await;
    let row = row.map_err(|error| query_error(doing, error))?;
    let text: &str = row.try_get(0).map_err(|error| query_error(doing, error))?;
    text.parse().map_err(|error| Error::new(ErrorKind::Protocol, doing).because(error))
}
