//! Whether a key is what its row says; pure.

use serde::{Deserialize, Serialize};

use crate::batch::CacheOp;
use crate::cache::{Content, Held, Remaining};

/// How a key differs from its row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The row has no key.
    Missing,
    /// It holds something else.
    Differs,
    /// No row has it.
    Orphan,
    /// It lives for ever, too long, or not for ever.
    Ttl,
}

impl Kind {
    /// As in JSON, in tables and as a label of metrics.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Missing => "missing",
            Kind::Differs => "differs",
            Kind::Orphan => "orphan",
            Kind::Ttl => "ttl",
        }
    }
}

/// What a comparison came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is right.
    Right,
    /// It is absent because its TTL is over.
    Expired,
    /// It is wrong.
    Wrong(Kind),
}

/// Compares what a key should be with what Redis holds. `ttl_ms` is the rule's own, before any jitter, which only
/// shortens.
pub fn judge(should: CacheOp<'_>, holds: &Held, ttl_ms: Option<u64>) -> Verdict {
    match (should, holds) {
        (CacheOp::Delete { .. }, Held { remaining: Remaining::Missing, .. }) => Verdict::Right,
        (CacheOp::Delete { .. }, _) => Verdict::Wrong(Kind::Differs),
        (CacheOp::Set { present_only: true, .. }, Held { remaining: Remaining::Missing, .. }) => Verdict::Right,
        (CacheOp::Set { .. }, Held { remaining: Remaining::Missing, .. }) => match ttl_ms {
            Some(_) => Verdict::Expired,
            None => Verdict::Wrong(Kind::Missing),
        },
        (CacheOp::Set { value, .. }, Held { content, .. }) if !is_string(content, value) => {
            Verdict::Wrong(Kind::Differs)
        }
        (CacheOp::Set { .. }, Held { remaining, .. }) => match (remaining, ttl_ms) {
            (Remaining::Ms(left), Some(ttl_ms)) if *left <= ttl_ms => Verdict::Right,
            (Remaining::Forever, None) => Verdict::Right,
            _ => Verdict::Wrong(Kind::Ttl),
        },
    }
}

fn is_string(content: &Content, value: &[u8]) -> bool {
    matches!(content, Content::String(held) if held == value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(value: Option<&[u8]>, remaining: Remaining, ttl_ms: Option<u64>, expected: Verdict) {
        let set = CacheOp::Set { key: b"k", value: b"1", ttl_ms, present_only: false };
        let content = value.map_or(Content::Other("hash".into()), |value| Content::String(value.to_vec()));
        let held = Held { content, remaining };
        assert_eq!(judge(set, &held, ttl_ms), expected, "{held:?}, {ttl_ms:?}");
    }

    #[test]
    fn every_way_to_be_wrong_has_its_name() {
        use Verdict::{Expired, Right, Wrong};
        check(Some(b"1"), Remaining::Forever, None, Right);
        check(Some(b"2"), Remaining::Forever, None, Wrong(Kind::Differs));
        check(None, Remaining::Forever, None, Wrong(Kind::Differs));
        check(None, Remaining::Missing, None, Wrong(Kind::Missing));
        check(Some(b"1"), Remaining::Ms(5), None, Wrong(Kind::Ttl));
        check(Some(b"1"), Remaining::Ms(1000), Some(1000), Right);
        check(Some(b"1"), Remaining::Ms(1001), Some(1000), Wrong(Kind::Ttl));
        check(Some(b"1"), Remaining::Forever, Some(1000), Wrong(Kind::Ttl));
        check(None, Remaining::Missing, Some(1000), Expired);
    }

    #[test]
    fn a_key_that_should_not_be_must_be_missing() {
        let delete = CacheOp::Delete { key: b"k" };
        let missing = Held { content: Content::Nothing, remaining: Remaining::Missing };
        assert_eq!(judge(delete, &missing, None), Verdict::Right);
        let present = Held { content: Content::String(b"1".to_vec()), remaining: Remaining::Forever };
        assert_eq!(judge(delete, &present, None), Verdict::Wrong(Kind::Differs));
        let asked_for = CacheOp::Set { key: b"k", value: b"1", ttl_ms: None, present_only: true };
        assert_eq!(judge(asked_for, &missing, None), Verdict::Right);
    }
}
