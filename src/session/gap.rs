//! Where to go on from: what slot, cache and server say of each other, and whether history is missing; pure.
//!
//! START_REPLICATION below the slot's confirmed position is silently moved forward by the server, so everything is
//! compared before it.

use crate::cache::checkpoint::{Checkpoint, Origin};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Lsn;

/// What is known before streaming begins.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// The server, the database and the slot that the configuration leads to.
    pub origin: &'a Origin,
    /// The end of the server's durable log.
    pub flush_lsn: Lsn,
    /// The slot; `None` if there is none.
    pub slot: Option<SlotFacts<'a>>,
    /// Where setup noted that the slot was made.
    pub born_at: Option<Lsn>,
    /// What Redis holds.
    pub stored: Option<&'a Checkpoint>,
    /// What this process last saw acknowledged by Redis.
    pub seen: Option<&'a Checkpoint>,
    /// Whether any other key stands under the prefix.
    pub cache_has_keys: bool,
}

/// The slot, as far as it matters here.
#[derive(Clone, Debug)]
pub struct SlotFacts<'a> {
    /// Its output plugin; `None` for a physical slot.
    pub plugin: Option<&'a str>,
    /// Its database.
    pub database: Option<&'a str>,
    /// What the server will not send again.
    pub confirmed: Lsn,
    /// Why it can no longer be used, if so.
    pub lost: Option<&'a str>,
}

/// Where to go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// A new history begins here.
    Anew {
        /// The slot's confirmed position.
        from: Lsn,
    },
    /// From the checkpoint in Redis.
    Resume {
        /// Whether it is older than one that was acknowledged, so that readers may have seen later states.
        new_epoch: bool,
    },
}

/// Compares everything with everything. `adopt` accepts what is missing or differs and begins anew.
pub fn examine(situation: &Situation<'_>, adopt: bool) -> Result<Start> {
    let slot = usable_slot(situation)?;
    match fits(situation, slot) {
        Err(error) if adopt => {
            tracing::warn!(%error, from = %slot.confirmed, "adopted: a new epoch begins");
            Ok(Start::Anew { from: slot.confirmed })
        }
        other => other,
    }
}

fn usable_slot<'s>(situation: &'s Situation<'_>) -> Result<&'s SlotFacts<'s>> {
    let name = &situation.origin.slot;
    let Some(slot) = &situation.slot else {
        return Err(match situation.stored {
            None => Error::new(ErrorKind::Config, format!("there is no replication slot `{name}`"))
                .hint("`keepstep setup` makes the slot and the publication; `keepstep setup --print` shows the SQL"),
            Some(stored) => gap(
                format!("the replication slot `{name}` is gone: what changed after {} is lost", stored.low),
                situation,
            ),
        });
    };
    let other =
        |what: String| Err(Error::new(ErrorKind::Identity, what).hint("choose another name in `[postgres] slot`"));
    if let Some(why) = slot.lost {
        return Err(gap(format!("the replication slot `{name}` was invalidated by the server: {why}"), situation));
    }
    match (slot.plugin, slot.database) {
        (Some("pgoutput"), Some(database)) if database == situation.origin.database => Ok(slot),
        (Some("pgoutput"), database) => {
            let theirs = database.unwrap_or("no database");
            other(format!(
                "slot `{name}` belongs to {theirs}, and keepstep is connected to {}",
                situation.origin.database
            ))
        }
        (Some(plugin), _) => {
            other(format!("slot `{name}` uses the output plugin {plugin}, and keepstep needs pgoutput"))
        }
        (None, _) => other(format!("slot `{name}` is physical, and keepstep needs a logical one")),
    }
}

fn fits(situation: &Situation<'_>, slot: &SlotFacts<'_>) -> Result<Start> {
    let Some(stored) = situation.stored else { return without_checkpoint(situation, slot) };
    same_origin(&stored.origin, situation.origin)?;
    if stored.origin.timeline != situation.origin.timeline {
        let (was, is) = (stored.origin.timeline, situation.origin.timeline);
        return Err(gap(
            format!("the server was promoted (timeline {was} became {is}): the two histories differ"),
            situation,
        ));
    }
    if situation.flush_lsn < stored.applied.lsn {
        let (applied, flushed) = (stored.applied, situation.flush_lsn);
        return Err(gap(
            format!("the cache is at {applied}, and the server's log ends at {flushed}: it lost changes"),
            situation,
        ));
    }
    if slot.confirmed > stored.low {
        let (low, confirmed) = (stored.low, slot.confirmed);
        return Err(gap(
            format!("the slot sends nothing before {confirmed}, and the cache has nothing after {low}"),
            situation,
        ));
    }
    let went_back = |seen: &Checkpoint| (stored.epoch, stored.applied) < (seen.epoch, seen.applied);
    Ok(Start::Resume { new_epoch: situation.seen.is_some_and(went_back) })
}

/// Redis holds no checkpoint: a first start, or everything was lost.
fn without_checkpoint(situation: &Situation<'_>, slot: &SlotFacts<'_>) -> Result<Start> {
    let confirmed = slot.confirmed;
    let lost = |what: String| Err(gap(what, situation));
    match (situation.seen, situation.born_at) {
        (Some(seen), _) => {
            lost(format!("Redis has lost the checkpoint, which was at {}, and with it the cache", seen.applied))
        }
        (None, Some(born)) if confirmed > born => {
            lost(format!("Redis holds no checkpoint, but the slot was read up to {confirmed}: the cache was lost"))
        }
        (None, None) if situation.cache_has_keys => lost(format!(
            "Redis holds keys under the prefix but no checkpoint: what changed before {confirmed} may be missing from them"
        )),
        _ => Ok(Start::Anew { from: confirmed }),
    }
}

fn same_origin(cache: &Origin, server: &Origin) -> Result<()> {
    let pairs = [
        ("system identifier", &cache.system, &server.system),
        ("database", &cache.database, &server.database),
        ("slot", &cache.slot, &server.slot),
    ];
    for (what, theirs, ours) in pairs {
        if theirs != ours {
            let message =
                format!("this cache was made from another source: its {what} is {theirs}, and here it is {ours}");
            return Err(Error::new(ErrorKind::Identity, message)
                .hint("check `[postgres] url`, `slot` and `[redis] prefix`")
                .hint("if the change is intended, `keepstep run --adopt` begins a new epoch here"));
        }
    }
    Ok(())
}

fn gap(message: String, situation: &Situation<'_>) -> Error {
    let error = Error::new(ErrorKind::Gap, message);
    let error = match situation.slot {
        None => error.hint("`keepstep setup` makes a new slot"),
        Some(SlotFacts { lost: Some(_), .. }) => {
            error.hint("`keepstep teardown` and `keepstep setup` make a new slot; raise `max_slot_wal_keep_size` if it was too small")
        }
        Some(_) => error,
    };
    error
        .hint("this version cannot rebuild the cache by itself: delete the keys under the prefix, then `keepstep run --adopt`")
        .hint("with the keys left in place, `--adopt` keeps stale ones until their rows change again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::checkpoint::tests::checkpoint;

    /// A cache at 200 and a slot confirmed at 150: nothing is missing.
    fn check(change: impl FnOnce(&mut Situation<'_>), adopt: bool) -> Result<Start, String> {
        let stored = checkpoint(200);
        let mut situation = Situation {
            origin: &stored.origin,
            flush_lsn: Lsn(300),
            slot: Some(SlotFacts { plugin: Some("pgoutput"), database: Some("shop"), confirmed: Lsn(150), lost: None }),
            born_at: Some(Lsn(100)),
            stored: Some(&stored),
            seen: None,
            cache_has_keys: true,
        };
        change(&mut situation);
        examine(&situation, adopt).map_err(|error| format!("{:?}: {error}", error.kind()))
    }

    fn confirmed(at: u64) -> SlotFacts<'static> {
        SlotFacts { plugin: Some("pgoutput"), database: Some("shop"), confirmed: Lsn(at), lost: None }
    }

    fn fails(change: impl FnOnce(&mut Situation<'_>), expected: &str) {
        let error = check(change, false).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn nothing_is_missing_while_the_slot_still_holds_what_the_cache_has_not() {
        assert_eq!(check(|_| {}, false), Ok(Start::Resume { new_epoch: false }));
        assert_eq!(check(|s| s.slot = Some(confirmed(200)), false), Ok(Start::Resume { new_epoch: false }));
    }

    #[test]
    fn a_first_start_is_no_gap() {
        let first = |s: &mut Situation<'_>| (s.stored, s.slot) = (None, Some(confirmed(100)));
        assert_eq!(check(first, false), Ok(Start::Anew { from: Lsn(100) }));
        let by_hand = |s: &mut Situation<'_>| (s.stored, s.born_at, s.cache_has_keys) = (None, None, false);
        assert_eq!(check(by_hand, false), Ok(Start::Anew { from: Lsn(150) }));
    }

    #[test]
    fn an_older_checkpoint_is_replayed_in_a_new_epoch() {
        let newer = checkpoint(250);
        let stored = checkpoint(200);
        let situation = Situation {
            origin: &stored.origin,
            flush_lsn: Lsn(300),
            slot: Some(confirmed(150)),
            born_at: None,
            stored: Some(&stored),
            seen: Some(&newer),
            cache_has_keys: true,
        };
        assert_eq!(examine(&situation, false).ok(), Some(Start::Resume { new_epoch: true }));
    }

    #[test]
    fn each_gap_is_named() {
        fails(|s| s.slot = None, "Gap: the replication slot `keepstep` is gone: what changed after 0/C8 is lost");
        fails(
            |s| s.slot = Some(SlotFacts { lost: Some("wal_removed"), ..confirmed(150) }),
            "Gap: the replication slot `keepstep` was inv",
        );
        fails(
            |s| s.slot = Some(confirmed(201)),
            "Gap: the slot sends nothing before 0/C9, and the cache has nothing after 0/C8",
        );
        fails(|s| s.flush_lsn = Lsn(199), "Gap: the cache is at 0/C8, and the server's log ends at 0/C7");
        fails(|s| s.stored = None, "Gap: Redis holds no checkpoint, but the slot was read up to 0/96");
        fails(|s| (s.stored, s.born_at) = (None, None), "Gap: Redis holds keys under the prefix but no checkpoint");
        let promoted = Origin { timeline: 2, ..checkpoint(1).origin };
        let error = examine_with(&promoted).expect_err("a gap");
        assert!(error.contains("Gap: the server was promoted (timeline 1 became 2)"), "{error}");
    }

    #[test]
    fn a_lost_checkpoint_is_a_gap_even_on_a_fresh_slot() {
        let seen = checkpoint(200);
        let origin = seen.origin.clone();
        let situation = Situation {
            origin: &origin,
            flush_lsn: Lsn(300),
            slot: Some(confirmed(100)),
            born_at: Some(Lsn(100)),
            stored: None,
            seen: Some(&seen),
            cache_has_keys: false,
        };
        let error = examine(&situation, false).expect_err("a gap");
        assert_eq!(error.kind(), ErrorKind::Gap);
        assert_eq!(examine(&situation, true).ok(), Some(Start::Anew { from: Lsn(100) }));
    }

    #[test]
    fn a_mistake_is_not_a_gap() {
        let other = Origin { system: "8".into(), ..checkpoint(1).origin };
        let error = examine_with(&other).expect_err("a mistake");
        assert!(
            error.contains("Identity: this cache was made from another source: its system identifier is 7"),
            "{error}"
        );
        fails(
            |s| s.slot = Some(SlotFacts { plugin: Some("wal2json"), ..confirmed(150) }),
            "Identity: slot `keepstep` uses",
        );
        fails(|s| s.slot = Some(SlotFacts { plugin: None, ..confirmed(150) }), "Identity: slot `keepstep` is physical");
        fails(
            |s| s.slot = Some(SlotFacts { database: Some("x"), ..confirmed(150) }),
            "Identity: slot `keepstep` belongs to x",
        );
        fails(|s| (s.slot, s.stored) = (None, None), "Config: there is no replication slot");
    }

    #[test]
    fn adopting_begins_anew_where_the_slot_stands() {
        assert_eq!(check(|s| s.slot = Some(confirmed(250)), true), Ok(Start::Anew { from: Lsn(250) }));
        assert_eq!(check(|_| {}, true), Ok(Start::Resume { new_epoch: false }), "nothing to adopt");
        assert!(check(|s| s.slot = None, true).is_err(), "no slot to adopt");
    }

    fn examine_with(origin: &Origin) -> Result<Start, String> {
        let stored = checkpoint(200);
        let situation = Situation {
            origin,
            flush_lsn: Lsn(300),
            slot: Some(confirmed(150)),
            born_at: None,
            stored: Some(&stored),
            seen: None,
            cache_has_keys: true,
        };
        examine(&situation, false).map_err(|error| format!("{:?}: {error}", error.kind()))
    }
}
