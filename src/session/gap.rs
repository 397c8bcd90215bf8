//! Where to go on from: what slot, cache and server say of each other, and whether history is missing; pure.
//!
//! START_REPLICATION below the slot's confirmed position is silently moved forward by the server, so everything is
//! compared before it.
//!
//! A **gap** is history that is missing: a new epoch begins, and every rule is made right from its table. A **mistake**
//! is a cache, a slot and a server that do not belong together: nothing is done about it unasked.

use super::debts::Reason;
use crate::cache::checkpoint::{Checkpoint, Origin};
use crate::config::OnGap;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Lsn;

/// What is known before streaming begins.
#[derive(Clone, Debug)]
pub struct Situation<'a> {
    /// The server, the database and the slot that the configuration leads to.
    pub origin: &'a Origin,
    /// What is streamed, as in "replication slot `keepstep`".
    pub stream: &'a str,
    /// The end of the server's durable log.
    pub flush_lsn: Lsn,
    /// The slot; `None` if there is none.
    pub slot: Option<SlotFacts<'a>>,
    /// Where whoever made the slot noted that it was made.
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
    pub lost: Option<Loss>,
}

/// What became of a slot, or of an outbox.
#[derive(Clone, Debug)]
pub struct Loss {
    /// As in "was invalidated".
    pub what: String,
    /// What would have prevented it.
    pub remedy: &'static str,
}

/// Where to go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start<'a> {
    /// From the checkpoint in Redis.
    Resume {
        /// It.
        stored: &'a Checkpoint,
        /// Whether it is older than one that was acknowledged, so that readers may have seen later states.
        new_epoch: bool,
    },
    /// A new epoch begins.
    Anew {
        /// Where.
        from: Place,
        /// Why.
        why: Why,
    },
}

/// Where a new epoch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At the slot's confirmed position.
    Slot(Lsn),
    /// At a slot that has to be made first, in place of a lost one if there is one.
    NewSlot,
}

/// Why a new epoch begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is the first: nothing was lost.
    FirstStart {
        /// Whether keys of somebody else's making are there, which may be anything.
        cache_has_keys: bool,
    },
    /// What the cache holds cannot be trusted any more.
    Lost(Reason),
}

/// Why slot, cache and server do not fit together.
enum Misfit {
    Gap(Reason, String),
    Mistake(String),
}

/// Compares everything with everything. A gap begins a new epoch, or is an error where `on_gap` says so; `adopt` accepts
/// gaps and mistakes alike.
///
/// # Errors
/// [`ErrorKind::Gap`], [`ErrorKind::Identity`], and [`ErrorKind::Config`] where no slot was ever made.
pub fn examine<'a>(situation: &Situation<'a>, adopt: bool, on_gap: OnGap) -> Result<Start<'a>> {
    let from = place(situation)?;
    let reason = match fits(situation) {
        Ok(start) => return Ok(start),
        Err(Misfit::Gap(reason, what)) if adopt || on_gap == OnGap::Reconcile => {
            tracing::warn!(reason = reason.label(), "{what}: a new epoch begins, and every rule is reconciled");
            reason
        }
        Err(Misfit::Mistake(what)) if adopt => {
            tracing::warn!("{what}: adopted; a new epoch begins, and every rule is reconciled");
            Reason::Asked
        }
        Err(Misfit::Gap(_, what)) => return Err(stop(what, situation)),
        Err(Misfit::Mistake(what)) => {
            return Err(Error::new(ErrorKind::Identity, what)
                .hint("check `[postgres] url`, `slot` and `[redis] prefix`")
                .hint("if the change is intended, `keepstep run --adopt` begins a new epoch here"));
        }
    };
    Ok(Start::Anew { from, why: Why::Lost(reason) })
}

/// Where a new epoch would begin. No slot that is somebody else's is ever touched.
fn place(situation: &Situation<'_>) -> Result<Place> {
    let name = &situation.origin.slot;
    let Some(slot) = &situation.slot else {
        let never_made = situation.stored.is_none() && situation.seen.is_none() && situation.born_at.is_none();
        return match never_made {
            true => Err(Error::new(ErrorKind::Config, format!("there is no {}", situation.stream))
                .hint("`keepstep setup` makes what is needed; `keepstep setup --print` shows the SQL")),
            false => Ok(Place::NewSlot),
        };
    };
    let ours = &situation.origin.database;
    let foreign = match (slot.plugin, slot.database) {
        (Some("pgoutput"), Some(database)) if database == ours => None,
        (Some("pgoutput"), database) => {
            let theirs = database.unwrap_or("no database");
            Some(format!("slot `{name}` belongs to {theirs}, and keepstep is connected to {ours}"))
        }
        (Some(plugin), _) => {
            Some(format!("slot `{name}` uses the output plugin {plugin}, and keepstep needs pgoutput"))
        }
        (None, _) => Some(format!("slot `{name}` is physical, and keepstep needs a logical one")),
    };
    match (foreign, &slot.lost) {
        (Some(what), _) => Err(Error::new(ErrorKind::Identity, what).hint("choose another name in `[postgres] slot`")),
        (None, Some(_)) => Ok(Place::NewSlot),
        (None, None) => Ok(Place::Slot(slot.confirmed)),
    }
}

fn fits<'a>(situation: &Situation<'a>) -> Result<Start<'a>, Misfit> {
    if let Some(known) = situation.stored.or(situation.seen) {
        same_origin(&known.origin, situation.origin)?;
        if known.origin.timeline != situation.origin.timeline {
            let (was, is) = (known.origin.timeline, situation.origin.timeline);
            let what = format!("the server was promoted (timeline {was} became {is}): the two histories differ");
            return Err(Misfit::Gap(Reason::Promoted, what));
        }
    }
    let slot = standing_slot(situation)?;
    let Some(stored) = situation.stored else { return without_checkpoint(situation, slot) };
    if situation.flush_lsn < stored.applied.lsn {
        let (applied, flushed) = (stored.applied, situation.flush_lsn);
        let what = format!("the cache is at {applied}, and the server's log ends at {flushed}: it lost changes");
        return Err(Misfit::Gap(Reason::WentBack, what));
    }
    let went_back = situation.seen.is_some_and(|seen| (stored.epoch, stored.applied) < (seen.epoch, seen.applied));
    if slot.confirmed > stored.low {
        let (low, confirmed) = (stored.low, slot.confirmed);
        let reason = if went_back { Reason::WentBack } else { Reason::SlotMoved };
        let what = format!("the slot sends nothing before {confirmed}, and the cache has nothing after {low}");
        return Err(Misfit::Gap(reason, what));
    }
    Ok(Start::Resume { stored, new_epoch: went_back })
}

/// The slot, if it can still be streamed.
fn standing_slot<'s>(situation: &'s Situation<'_>) -> Result<&'s SlotFacts<'s>, Misfit> {
    let stream = situation.stream;
    let what = match (&situation.slot, situation.stored.or(situation.seen)) {
        (Some(SlotFacts { lost: Some(Loss { what, .. }), .. }), _) => format!("the {stream} {what}"),
        (Some(slot), _) => return Ok(slot),
        (None, Some(known)) => {
            format!("the {stream} is gone: what changed after {} is lost", known.low)
        }
        (None, None) => format!("the {stream} is gone, and Redis holds no checkpoint"),
    };
    Err(Misfit::Gap(Reason::SlotLost, what))
}

/// Redis holds no checkpoint: a first start, or everything was lost.
fn without_checkpoint<'a>(situation: &Situation<'a>, slot: &SlotFacts<'_>) -> Result<Start<'a>, Misfit> {
    let (confirmed, cache_has_keys) = (slot.confirmed, situation.cache_has_keys);
    let what = match (situation.seen, situation.born_at) {
        (Some(seen), _) => {
            format!("Redis has lost the checkpoint, which was at {}, and with it the cache", seen.applied)
        }
        (None, Some(born)) if confirmed > born => {
            format!("Redis holds no checkpoint, but the slot was read up to {confirmed}: the cache was lost")
        }
        (None, None) if cache_has_keys => format!(
            "Redis holds keys under the prefix but no checkpoint: what changed before {confirmed} may be missing from \
             them"
        ),
        _ => return Ok(Start::Anew { from: Place::Slot(confirmed), why: Why::FirstStart { cache_has_keys } }),
    };
    Err(Misfit::Gap(Reason::CacheLost, what))
}

fn same_origin(cache: &Origin, server: &Origin) -> Result<(), Misfit> {
    let pairs = [
        ("system identifier", &cache.system, &server.system),
        ("database", &cache.database, &server.database),
        ("slot", &cache.slot, &server.slot),
    ];
    match pairs.iter().find(|(_, theirs, ours)| theirs != ours) {
        None => Ok(()),
        Some((what, theirs, ours)) => Err(Misfit::Mistake(format!(
            "this cache was made from another source: its {what} is {theirs}, and here it is {ours}"
        ))),
    }
}

/// `on_gap = "stop"`: the reason, and what mends it.
fn stop(what: String, situation: &Situation<'_>) -> Error {
    let error = Error::new(ErrorKind::Gap, what)
        .hint(
            "`keepstep run --adopt` mends it: it makes a new slot or empties the outbox where that is needed, begins a new \
             epoch, and makes the keys of every rule right from the tables",
        )
        .hint("`on_gap = \"reconcile\"` in [postgres] has that done without being asked");
    match &situation.slot {
        Some(SlotFacts { lost: Some(Loss { remedy, .. }), .. }) => error.hint(*remedy),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;
    use crate::cache::checkpoint::tests::checkpoint;

    fn confirmed(at: u64) -> SlotFacts<'static> {
        SlotFacts { plugin: Some("pgoutput"), database: Some("shop"), confirmed: Lsn(at), lost: None }
    }

    /// A cache at 200.
    fn stored() -> &'static Checkpoint {
        static STORED: LazyLock<Checkpoint> = LazyLock::new(|| checkpoint(200));
        &STORED
    }

    fn lost() -> SlotFacts<'static> {
        let what = "was invalidated by the server: wal_removed".to_owned();
        SlotFacts { lost: Some(Loss { what, remedy: "" }), ..confirmed(150) }
    }

    /// A cache at 200 and a slot confirmed at 150, where nothing is missing, with a change.
    fn check(adopt: bool, on_gap: OnGap, change: impl FnOnce(&mut Situation<'_>)) -> Result<Start<'static>, String> {
        let stored = stored();
        let mut situation = Situation {
            origin: &stored.origin,
            stream: "replication slot `keepstep`",
            flush_lsn: Lsn(300),
            slot: Some(confirmed(150)),
            born_at: Some(Lsn(100)),
            stored: Some(stored),
            seen: None,
            cache_has_keys: true,
        };
        change(&mut situation);
        examine(&situation, adopt, on_gap).map_err(|error| format!("{:?}: {error}", error.kind()))
    }

    fn ordinary(change: impl FnOnce(&mut Situation<'_>)) -> Result<Start<'static>, String> {
        check(false, OnGap::Reconcile, change)
    }

    /// A gap has a reason and a place to begin anew, and with `on_gap = "stop"` it says this.
    fn gap(reason: Reason, from: Place, said: &str, change: impl Fn(&mut Situation<'_>)) {
        let anew = Start::Anew { from, why: Why::Lost(reason) };
        assert_eq!(ordinary(&change), Ok(anew), "{said}");
        assert_eq!(check(true, OnGap::Stop, &change), Ok(anew), "adopted: {said}");
        let error = check(false, OnGap::Stop, change).expect_err(said);
        assert!(error.starts_with(&format!("Gap: {said}")), "{error}");
    }

    fn mistake(said: &str, change: impl Fn(&mut Situation<'_>)) {
        for on_gap in [OnGap::Reconcile, OnGap::Stop] {
            let error = check(false, on_gap, &change).expect_err(said);
            assert!(error.starts_with(said), "{error}");
        }
    }

    const STANDING: Place = Place::Slot(Lsn(150));
    const NEW: Place = Place::NewSlot;

    #[test]
    fn nothing_is_missing_while_the_slot_still_holds_what_the_cache_has_not() {
        let resume = Ok(Start::Resume { stored: stored(), new_epoch: false });
        assert_eq!(ordinary(|_| {}), resume);
        assert_eq!(ordinary(|s| s.slot = Some(confirmed(200))), resume);
        assert_eq!(check(true, OnGap::Stop, |_| {}), resume, "nothing to adopt");
    }

    #[test]
    fn a_first_start_is_no_gap() {
        let first = |from, cache_has_keys| {
            Ok(Start::Anew { from: Place::Slot(Lsn(from)), why: Why::FirstStart { cache_has_keys } })
        };
        for on_gap in [OnGap::Reconcile, OnGap::Stop] {
            let by_setup = |s: &mut Situation<'_>| (s.stored, s.slot) = (None, Some(confirmed(100)));
            assert_eq!(check(false, on_gap, by_setup), first(100, true));
            let by_hand = |s: &mut Situation<'_>| (s.stored, s.born_at, s.cache_has_keys) = (None, None, false);
            assert_eq!(check(false, on_gap, by_hand), first(150, false));
        }
        mistake("Config: there is no replication slot", |s| (s.slot, s.stored, s.born_at) = (None, None, None));
    }

    #[test]
    fn an_older_checkpoint_is_replayed_in_a_new_epoch() {
        let newer = checkpoint(250);
        let stored = checkpoint(200);
        let situation = |slot| Situation {
            origin: &stored.origin,
            stream: "replication slot `keepstep`",
            flush_lsn: Lsn(300),
            slot: Some(confirmed(slot)),
            born_at: None,
            stored: Some(&stored),
            seen: Some(&newer),
            cache_has_keys: true,
        };
        let bridged = examine(&situation(150), false, OnGap::Stop).ok();
        assert_eq!(bridged, Some(Start::Resume { stored: &stored, new_epoch: true }));
        let beyond = examine(&situation(201), false, OnGap::Reconcile).ok();
        let why = Why::Lost(Reason::WentBack);
        assert_eq!(beyond, Some(Start::Anew { from: Place::Slot(Lsn(201)), why }));
    }

    #[test]
    fn each_gap_is_named_and_mends_itself() {
        gap(Reason::SlotLost, NEW, "the replication slot `keepstep` is gone: what changed after 0/C8 is lost", |s| {
            s.slot = None;
        });
        gap(Reason::SlotLost, NEW, "the replication slot `keepstep` is gone, and Redis holds no checkpoint", |s| {
            (s.slot, s.stored) = (None, None);
        });
        gap(Reason::SlotLost, NEW, "the replication slot `keepstep` was invalidated by the server: wal_rem", |s| {
            s.slot = Some(lost());
        });
        let moved = Place::Slot(Lsn(201));
        gap(
            Reason::SlotMoved,
            moved,
            "the slot sends nothing before 0/C9, and the cache has nothing after 0/C8",
            |s| {
                s.slot = Some(confirmed(201));
            },
        );
        gap(Reason::WentBack, STANDING, "the cache is at 0/C8, and the server's log ends at 0/C7", |s| {
            s.flush_lsn = Lsn(199);
        });
        gap(Reason::CacheLost, STANDING, "Redis holds no checkpoint, but the slot was read up to 0/96", |s| {
            s.stored = None;
        });
        gap(Reason::CacheLost, STANDING, "Redis holds keys under the prefix but no checkpoint", |s| {
            (s.stored, s.born_at) = (None, None);
        });
    }

    #[test]
    fn a_promotion_is_named_as_such_though_the_slot_stayed_behind() {
        let promoted = Origin { timeline: 2, ..checkpoint(1).origin };
        for (slot, from) in [(Some(confirmed(150)), STANDING), (None, NEW)] {
            let stored = checkpoint(200);
            let situation = Situation {
                origin: &promoted,
                stream: "replication slot `keepstep`",
                flush_lsn: Lsn(300),
                slot,
                born_at: Some(Lsn(100)),
                stored: Some(&stored),
                seen: None,
                cache_has_keys: true,
            };
            let why = Why::Lost(Reason::Promoted);
            assert_eq!(examine(&situation, false, OnGap::Reconcile).ok(), Some(Start::Anew { from, why }));
            let error = examine(&situation, false, OnGap::Stop).expect_err("a gap").to_string();
            assert!(error.contains("the server was promoted (timeline 1 became 2)"), "{error}");
        }
    }

    #[test]
    fn a_lost_checkpoint_is_a_gap_even_on_a_fresh_slot() {
        let seen = checkpoint(200);
        let situation = Situation {
            origin: &seen.origin,
            stream: "replication slot `keepstep`",
            flush_lsn: Lsn(300),
            slot: Some(confirmed(100)),
            born_at: Some(Lsn(100)),
            stored: None,
            seen: Some(&seen),
            cache_has_keys: false,
        };
        let error = examine(&situation, false, OnGap::Stop).expect_err("a gap");
        assert_eq!(error.kind(), ErrorKind::Gap);
        let why = Why::Lost(Reason::CacheLost);
        let anew = Start::Anew { from: Place::Slot(Lsn(100)), why };
        assert_eq!(examine(&situation, false, OnGap::Reconcile).ok(), Some(anew));
    }

    #[test]
    fn a_mistake_is_not_a_gap() {
        let other = Origin { system: "8".into(), ..checkpoint(1).origin };
        let stored = checkpoint(200);
        // Not even where the slot is missing: it would be made on the wrong server.
        for slot in [Some(confirmed(150)), Some(lost()), None] {
            let situation = |seen: bool| Situation {
                origin: &other,
                stream: "replication slot `keepstep`",
                flush_lsn: Lsn(300),
                slot: slot.clone(),
                born_at: None,
                stored: Some(&stored).filter(|_| !seen),
                seen: Some(&stored).filter(|_| seen),
                cache_has_keys: true,
            };
            for seen in [false, true] {
                let error = examine(&situation(seen), false, OnGap::Reconcile).expect_err("a mistake");
                assert_eq!(error.kind(), ErrorKind::Identity, "{error}");
                assert!(error.to_string().contains("its system identifier is 7, and here it is 8"), "{error}");
                let adopted = examine(&situation(seen), true, OnGap::Stop);
                let asked = |start| matches!(start, Start::Anew { why: Why::Lost(Reason::Asked), .. });
                assert!(adopted.is_ok_and(asked));
            }
        }
    }

    #[test]
    fn a_slot_of_somebody_else_is_never_touched() {
        for slot in [confirmed(150), lost()] {
            let plugin = SlotFacts { plugin: Some("wal2json"), ..slot.clone() };
            mistake("Identity: slot `keepstep` uses", |s| s.slot = Some(plugin.clone()));
            let physical = SlotFacts { plugin: None, ..slot.clone() };
            mistake("Identity: slot `keepstep` is physical", |s| s.slot = Some(physical.clone()));
            let elsewhere = SlotFacts { database: Some("x"), ..slot };
            mistake("Identity: slot `keepstep` belongs to x", |s| s.slot = Some(elsewhere.clone()));
            assert!(check(true, OnGap::Reconcile, |s| s.slot = Some(elsewhere.clone())).is_err(), "not even adopted");
        }
    }
}
