//! What the stream has touched while tables are read: the newer of the two, where both speak of one cell; pure.
//!
//! A chunk's snapshot does not see some of the transactions that are decoded before the chunk goes out. Their own
//! operations are newer than the chunk, so the chunk leaves these cells alone. What a snapshot sees, every later one of
//! the same primary sees too, so it is forgotten.

use std::collections::HashSet;

use super::visibility::Snapshot;
use crate::batch::{CellId, CellSet};
use crate::model::Xid;

/// How many touches are kept: 24 bytes each. Beyond it the read is given up and begins again.
pub const TOUCHES_MAX: usize = 1 << 20;

/// The touches that the last snapshot does not see.
#[derive(Debug, Default)]
pub struct Touches {
    cells: Vec<(Xid, CellId)>,
    /// Rules whose keys went all at once (TRUNCATE).
    rules: Vec<(Xid, u16)>,
}

impl Touches {
    /// A transaction has decided the cell.
    pub fn cell(&mut self, xid: Xid, cell: CellId) {
        self.cells.push((xid, cell));
    }

    /// A transaction has decided every cell of the rule.
    pub fn rule(&mut self, xid: Xid, rule: u16) {
        self.rules.push((xid, rule));
    }

    /// The cells, some of them several times.
    pub fn cells(&self) -> impl Iterator<Item = CellId> {
        self.cells.iter().map(|(_, cell)| *cell)
    }

    /// Whether there are more than may be kept.
    pub fn overflows(&self) -> bool {
        self.cells.len() > TOUCHES_MAX || self.rules.len() > TOUCHES_MAX
    }

    /// A chunk is read with this snapshot: what it sees is in the chunk, and in all later ones.
    pub fn forget_seen(&mut self, snapshot: &Snapshot) {
        self.cells.retain(|(xid, _)| !snapshot.sees(*xid));
        self.rules.retain(|(xid, _)| !snapshot.sees(*xid));
    }

    /// What a chunk of this snapshot must leave alone.
    pub fn newer_than(&self, snapshot: &Snapshot) -> Newer {
        Newer {
            cells: self.cells.iter().filter(|(xid, _)| !snapshot.sees(*xid)).map(|(_, cell)| *cell).collect(),
            rules: self.rules.iter().filter(|(xid, _)| !snapshot.sees(*xid)).map(|(_, rule)| *rule).collect(),
        }
    }
}

/// Cells of which the stream has said something newer than a chunk.
#[derive(Debug, Default)]
pub struct Newer {
    cells: CellSet,
    rules: HashSet<u16>,
}

impl Newer {
    /// Whether this is one of them.
    pub fn has(&self, rule: u16, cell: CellId) -> bool {
        self.rules.contains(&rule) || self.cells.contains(&cell)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty() && self.rules.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(text: &str) -> Snapshot {
        text.parse().expect("a snapshot")
    }

    #[test]
    fn only_what_the_snapshot_does_not_see_is_newer() {
        let mut touches = Touches::default();
        touches.cell(Xid(5), CellId(1));
        touches.cell(Xid(12), CellId(2));
        touches.cell(Xid(20), CellId(3));
        touches.rule(Xid(12), 7);
        let first = snapshot("10:15:12");
        let newer = touches.newer_than(&first);
        assert_eq!([1, 2, 3].map(|cell| newer.has(0, CellId(cell))), [false, true, true]);
        assert!(newer.has(7, CellId(9)) && !newer.has(8, CellId(9)), "a truncated rule");
        touches.forget_seen(&snapshot("13:15:"));
        let newer = touches.newer_than(&first);
        assert_eq!([1, 2, 3].map(|cell| newer.has(0, CellId(cell))), [false, false, true], "forgotten");
        assert!(!newer.has(7, CellId(9)));
    }
}
