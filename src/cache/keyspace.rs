//! Going through keys step by step, without taking the server for oneself.

use std::time::{Duration, Instant};

use super::connection::{Connection, Failure};
use super::writer::scan;
use crate::rules::pattern::Pattern;

/// After each step the server is left alone for as long as the step took, but no longer than this.
const REST_MAX: Duration = Duration::from_millis(100);

/// Hands over every key that begins with what all the patterns begin with. A key that is there all the time comes at
/// least once; how often, if a hash table of the server's grows meanwhile, is not known (SCAN).
pub(super) async fn walk(
    connection: &mut Connection,
    patterns: &[&Pattern],
    mut step: impl AsyncFnMut(&mut Connection, Vec<Vec<u8>>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let Some(prefix) = common_prefix(patterns.iter().map(|pattern| pattern.literal_prefix())) else { return Ok(()) };
    let glob = Pattern::beginning_with(prefix).scan_glob();
    let mut cursor = 0;
    loop {
        let began = Instant::now();
        let (next, keys) = scan(connection, cursor, &glob).await?;
        step(connection, keys).await?;
        if next == 0 {
            return Ok(());
        }
        cursor = next;
        tokio::time::sleep(began.elapsed().min(REST_MAX)).await;
    }
}

/// What all of them begin with; `None` if there is none.
pub(super) fn common_prefix<'p>(texts: impl Iterator<Item = &'p [u8]>) -> Option<&'p [u8]> {
    texts.reduce(|one, other| {
        let same = one.iter().zip(other).take_while(|(a, b)| a == b).count();
        &one[..same]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_begin_with() {
        let common = |texts: &[&'static str]| {
            common_prefix(texts.iter().map(|text| text.as_bytes()))
                .map(|prefix| String::from_utf8_lossy(prefix).into_owned())
        };
        assert_eq!(common(&[]), None);
        assert_eq!(common(&["shop:product:"]).as_deref(), Some("shop:product:"));
        assert_eq!(common(&["shop:product:", "shop:page:", "shop:price:"]).as_deref(), Some("shop:p"));
        assert_eq!(common(&["a", "b"]).as_deref(), Some(""));
    }
}
