//! Which transactions a snapshot sees; pure.
//!
//! Logical decoding can deliver a commit before the transaction is visible on the primary: its record is flushed, and
//! its backend still waits for a standby or has not left the proc array. So no LSN says what a read contains; only
//! the snapshot of the read does.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Xid;

/// A `pg_snapshot`: `xmin:xmax:xip_list` (the manual's "Transaction ID and Snapshot Information Functions"), taken on
/// the primary. On a standby the list is empty whatever is running.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Snapshot {
    /// Every transaction before it has ended.
    xmin: u64,
    /// No transaction from here on had ended.
    xmax: u64,
    /// Those in between that had not; in ascending order.
    running: Vec<u64>,
}

impl Snapshot {
    /// Sees nothing: before the first transaction.
    pub fn of_nothing() -> Self {
        Snapshot { xmin: 1, xmax: 1, running: Vec::new() }
    }

    /// No transaction from here on is seen.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    /// Those before that are not seen either, as an SQL array.
    pub fn running_as_array(&self) -> String {
        let running: Vec<String> = self.running.iter().map(u64::to_string).collect();
        format!("{{{}}}", running.join(","))
    }

    /// Whether what the transaction did shows, given that it committed.
    pub fn sees(&self, xid: Xid) -> bool {
        let xid = self.widen(xid);
        xid < self.xmin || xid < self.xmax && self.running.binary_search(&xid).is_err()
    }

    /// Whether every transaction up to `xid`, which is whole, has ended.
    pub fn is_past(&self, xid: u64) -> bool {
        self.xmin > xid
    }

    /// The whole transaction id: of all with these lower 32 bits the nearest to the snapshot. Transactions that are
    /// decoded now are never 2^31 away from those that run now.
    fn widen(&self, Xid(xid): Xid) -> u64 {
        let distance = xid.wrapping_sub(self.xmax as u32).cast_signed();
        self.xmax.wrapping_add_signed(i64::from(distance))
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        let mut running = self.running.iter();
        running.next().map_or(Ok(()), |first| write!(f, "{first}"))?;
        running.try_for_each(|xid| write!(f, ",{xid}"))
    }
}

impl From<Snapshot> for String {
    fn from(snapshot: Snapshot) -> String {
        snapshot.to_string()
    }
}

impl TryFrom<String> for Snapshot {
    type Error = InvalidSnapshot;

    fn try_from(text: String) -> Result<Self, InvalidSnapshot> {
        text.parse()
    }
}

/// The text is not of the form `10:20:10,14,15`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a snapshot of the form 10:20:10,14,15")]
pub struct InvalidSnapshot(String);

impl FromStr for Snapshot {
    type Err = InvalidSnapshot;

    fn from_str(text: &str) -> Result<Self, InvalidSnapshot> {
        let parse = || {
            let (xmin, rest) = text.split_once(':')?;
            let (xmax, list) = rest.split_once(':')?;
            let running = list.split(',').filter(|xid| !xid.is_empty()).map(|xid| xid.parse().ok());
            let mut running = running.collect::<Option<Vec<u64>>>()?;
            running.sort_unstable();
            Some(Snapshot { xmin: xmin.parse().ok()?, xmax: xmax.parse().ok()?, running })
        };
        parse().ok_or_else(|| InvalidSnapshot(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        text.parse().expect("a snapshot")
    }

    #[test]
    fn it_sees_what_had_ended() {
        let snapshot = snapshot("10:20:10,14,15");
        for (xid, seen) in
            [(9, true), (10, false), (11, true), (14, false), (16, true), (19, true), (20, false), (21, false)]
        {
            assert_eq!(snapshot.sees(Xid(xid)), seen, "{xid}");
        }
        assert!(snapshot.is_past(9) && !snapshot.is_past(10));
    }

    #[test]
    fn ids_are_widened_over_the_wraparound() {
        let snapshot = snapshot("4294967290:4294967300:4294967298");
        let wrapped = |xid: u64| Xid(xid as u32);
        for (xid, seen) in
            [(4_294_967_289, true), (4_294_967_297, true), (4_294_967_298, false), (4_294_967_300, false)]
        {
            assert_eq!(snapshot.sees(wrapped(xid)), seen, "{xid}");
        }
    }

    #[test]
    fn it_writes_what_it_reads() {
        for text in ["10:20:10,14,15", "3:3:", "7:9:7"] {
            assert_eq!(snapshot(text).to_string(), text);
        }
        assert!(!Snapshot::of_nothing().sees(Xid(1)), "nothing");
        assert_eq!(snapshot(&Snapshot::of_nothing().to_string()), Snapshot::of_nothing());
    }

    #[test]
    fn other_text_is_an_error() {
        for text in ["", "1", "1:2", "a:2:", "1:2:x", "1:2:3,,x"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
        assert!(snapshot("3:3:").sees(Xid(2)));
    }
}
