//! Whether a key is what its row says; pure.

use serde::{Deserialize, Serialize};

use crate::batch::{CacheOp, Form, Life, fields};
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

/// How far keepstep's clock and Redis's may be apart, and how long the question may take.
const CLOCKS_APART_MS: u64 = 5000;

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

/// Compares what a key, or a member, should be with what Redis holds at `now_ms` (since 1970).
///
/// A TTL may be shorter than the rule's: jitter shortens it, and time passes.
pub fn judge(should: CacheOp<'_>, holds: &Held, now_ms: u64) -> Verdict {
    let missing = holds.content == Content::Nothing;
    match should {
        CacheOp::Delete { .. } | CacheOp::Remove { .. } if missing => Verdict::Right,
        CacheOp::Remove { .. } if !matches!(holds.content, Content::Member { .. }) => Verdict::Right,
        CacheOp::Delete { .. } | CacheOp::Remove { .. } => Verdict::Wrong(Kind::Differs),
        CacheOp::Add { .. } if missing => Verdict::Wrong(Kind::Missing),
        CacheOp::Add { score, .. } => match &holds.content {
            Content::Member { score: held } if same_score(score, held.as_deref()) => Verdict::Right,
            _ => Verdict::Wrong(Kind::Differs),
        },
        CacheOp::Set { present_only: true, .. } if missing => Verdict::Right,
        // Redis has no empty hashes.
        CacheOp::Set { form: Form::Hash, value: [], .. } if missing => Verdict::Right,
        CacheOp::Set { life, .. } if missing => match life {
            Life::Ms(_) | Life::Keep => Verdict::Expired,
            Life::Until(at_ms) if at_ms <= now_ms => Verdict::Expired,
            Life::Until(_) | Life::Forever => Verdict::Wrong(Kind::Missing),
        },
        CacheOp::Set { value, form, .. } if !is_same(form, value, &holds.content) => Verdict::Wrong(Kind::Differs),
        CacheOp::Set { life, .. } if lives(life, holds.remaining, now_ms) => Verdict::Right,
        CacheOp::Set { .. } => Verdict::Wrong(Kind::Ttl),
    }
}

fn is_same(form: Form, value: &[u8], content: &Content) -> bool {
    match (form, content) {
        (Form::String, Content::String(held)) => held == value,
        (Form::Hash, Content::Hash(held)) => {
            let fields: Vec<(&[u8], &[u8])> = fields(value).collect();
            let holds = |(name, value): &(&[u8], &[u8])| held.get(*name).is_some_and(|held| held == value);
            fields.len() == held.len() && fields.iter().all(holds)
        }
        // Redis keeps JSON parsed, and may show it with other spaces and digits.
        (Form::Json, Content::Json(held)) => {
            let parsed = |text: &[u8]| serde_json::from_slice::<serde_json::Value>(text).ok();
            parsed(value).is_some_and(|value| Some(value) == parsed(held))
        }
        _ => false,
    }
}

/// Redis shows a score's float in its own way.
fn same_score(should: Option<&[u8]>, held: Option<&[u8]>) -> bool {
    let number = |text: &[u8]| str::from_utf8(text).ok()?.parse::<f64>().ok();
    match (should, held) {
        (None, None) => true,
        (Some(should), Some(held)) => number(should).is_some_and(|should| Some(should) == number(held)),
        _ => false,
    }
}

fn lives(life: Life, remaining: Remaining, now_ms: u64) -> bool {
    match (life, remaining) {
        (Life::Keep, _) | (Life::Forever, Remaining::Forever) => true,
        (Life::Ms(most), Remaining::Ms(left)) => left <= most,
        (Life::Until(at_ms), Remaining::Ms(left)) => (now_ms + left).abs_diff(at_ms) <= CLOCKS_APART_MS,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(form: Form, value: &[u8], life: Life) -> CacheOp<'_> {
        CacheOp::Set { key: b"k", value, form, life, present_only: false }
    }

    fn check(value: Option<&[u8]>, remaining: Remaining, life: Life, expected: Verdict) {
        let content = match (value, remaining) {
            (_, Remaining::Missing) => Content::Nothing,
            (None, _) => Content::Other("list".into()),
            (Some(value), _) => Content::String(value.to_vec()),
        };
        let held = Held { content, remaining };
        assert_eq!(judge(set(Form::String, b"1", life), &held, 10_000), expected, "{held:?}, {life:?}");
    }

    #[test]
    fn every_way_to_be_wrong_has_its_name() {
        use Verdict::{Expired, Right, Wrong};
        check(Some(b"1"), Remaining::Forever, Life::Forever, Right);
        check(Some(b"2"), Remaining::Forever, Life::Forever, Wrong(Kind::Differs));
        check(None, Remaining::Forever, Life::Forever, Wrong(Kind::Differs));
        check(None, Remaining::Missing, Life::Forever, Wrong(Kind::Missing));
        check(Some(b"1"), Remaining::Ms(5), Life::Forever, Wrong(Kind::Ttl));
        check(Some(b"1"), Remaining::Ms(1000), Life::Ms(1000), Right);
        check(Some(b"1"), Remaining::Ms(1001), Life::Ms(1000), Wrong(Kind::Ttl));
        check(Some(b"1"), Remaining::Forever, Life::Ms(1000), Wrong(Kind::Ttl));
        check(None, Remaining::Missing, Life::Ms(1000), Expired);
        check(Some(b"1"), Remaining::Ms(20_000), Life::Until(30_000), Right);
        check(Some(b"1"), Remaining::Ms(10_000), Life::Until(30_000), Wrong(Kind::Ttl));
        check(None, Remaining::Missing, Life::Until(10_000), Expired);
        check(None, Remaining::Missing, Life::Until(10_001), Wrong(Kind::Missing));
        check(Some(b"1"), Remaining::Ms(1), Life::Keep, Right);
    }

    #[test]
    fn a_key_that_should_not_be_must_be_missing() {
        let delete = CacheOp::Delete { key: b"k" };
        let missing = Held { content: Content::Nothing, remaining: Remaining::Missing };
        assert_eq!(judge(delete, &missing, 0), Verdict::Right);
        let present = Held { content: Content::String(b"1".to_vec()), remaining: Remaining::Forever };
        assert_eq!(judge(delete, &present, 0), Verdict::Wrong(Kind::Differs));
        let asked_for =
            CacheOp::Set { key: b"k", value: b"1", form: Form::String, life: Life::Forever, present_only: true };
        assert_eq!(judge(asked_for, &missing, 0), Verdict::Right);
        assert_eq!(judge(set(Form::Hash, b"", Life::Forever), &missing, 0), Verdict::Right, "a row of NULLs");
    }

    #[test]
    fn values_are_compared_by_what_they_mean() {
        let mut hash = Vec::new();
        for (name, text) in [("a", "1"), ("b", "2")] {
            let written = crate::batch::field(&mut hash, name.as_bytes(), |out| {
                out.extend_from_slice(text.as_bytes());
                Ok::<_, ()>(())
            });
            written.expect("it was rendered");
        }
        let held = |pairs: &[(&str, &str)]| {
            Content::Hash(
                pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect(),
            )
        };
        assert!(is_same(Form::Hash, &hash, &held(&[("b", "2"), ("a", "1")])));
        for wrong in [held(&[("a", "1")]), held(&[("a", "1"), ("b", "3")]), held(&[("a", "1"), ("b", "2"), ("c", "")])]
        {
            assert!(!is_same(Form::Hash, &hash, &wrong), "{wrong:?}");
        }
        assert!(is_same(Form::Json, b"{\"a\": 1.0}", &Content::Json(b"{\"a\":1.0}".to_vec())));
        assert!(!is_same(Form::Json, b"{\"a\": 1}", &Content::Json(b"{\"a\":2}".to_vec())));
    }

    #[test]
    fn members_are_there_with_their_scores() {
        let check = |score: Option<&str>, content: Content, expected| {
            let should = CacheOp::Add { key: b"k", member: b"m", score: score.map(str::as_bytes) };
            let held = Held { content, remaining: Remaining::Forever };
            assert_eq!(judge(should, &held, 0), expected, "{held:?}");
        };
        let member = |score: Option<&str>| Content::Member { score: score.map(|score| score.as_bytes().to_vec()) };
        check(None, member(None), Verdict::Right);
        check(None, Content::Nothing, Verdict::Wrong(Kind::Missing));
        check(None, Content::Other("string".into()), Verdict::Wrong(Kind::Differs));
        check(Some("1.5"), member(Some("1.5")), Verdict::Right);
        check(Some("1e20"), member(Some("100000000000000000000")), Verdict::Right);
        check(Some("1.5"), member(Some("2")), Verdict::Wrong(Kind::Differs));
        check(Some("1.5"), member(None), Verdict::Wrong(Kind::Differs));
        let gone = CacheOp::Remove { key: b"k", member: b"m", sorted: false };
        let held = |content| Held { content, remaining: Remaining::Forever };
        assert_eq!(judge(gone, &held(member(None)), 0), Verdict::Wrong(Kind::Differs));
        assert_eq!(judge(gone, &held(Content::Nothing), 0), Verdict::Right);
    }
}
