//! The keys that a template can have made, as a regular language over bytes.
//!
//! A sweep (TRUNCATE, orphans, clear) may delete only keys that a rule owns, and must find every one of them. A glob
//! cannot say that: `user:*` also claims `user:1:cart`. So each placeholder becomes the language of its column's type in
//! text form (an integer is `-?[0-9]+`), changed by its filters; what has no known form is any bytes at all. The
//! language is never smaller than what Postgres can send: **a key that the template can make always matches**.
//!
//! Questions about two templates (can both make one key?) and about one (can two rows share a key because `a:b` + `c`
//! reads as `a` + `b:c`?) are answered exactly, by walking two runs of the automaton over the same bytes; the answer is
//! an example of such a key.
//!
//! The automaton is a position automaton (Glushkov): a state is "this byte set has just matched", so there are no
//! empty moves, and a match costs the length of the key times the few states alive at once, whatever the template.

use tokio_postgres::types::Type;

use super::filter::{Filter, UPPER_HEX, is_unreserved};

/// A set of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct ByteSet([u64; 4]);

impl FromIterator<u8> for ByteSet {
    fn from_iter<T: IntoIterator<Item = u8>>(bytes: T) -> Self {
        let mut words = [0; 4];
        for byte in bytes {
            words[usize::from(byte >> 6)] |= 1 << (byte & 63);
        }
        ByteSet(words)
    }
}

impl ByteSet {
    fn bytes(self) -> impl Iterator<Item = u8> {
        (0..=u8::MAX).filter(move |byte| self.contains(*byte))
    }

    fn contains(&self, byte: u8) -> bool {
        self.0[usize::from(byte >> 6)] >> (byte & 63) & 1 == 1
    }

    fn intersection(&self, other: &Self) -> Self {
        ByteSet(std::array::from_fn(|word| self.0[word] & other.0[word]))
    }

    fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    fn is_ascii(&self) -> bool {
        self.0[2..] == [0; 2]
    }

    /// A byte of the set, one that reads well in a message if there is one.
    fn example(&self) -> Option<u8> {
        (b'1'..=b'9')
            .chain(b'a'..=b'z')
            .chain(b'A'..=b'Z')
            .chain(b' '..=b'~')
            .chain(0..=u8::MAX)
            .find(|b| self.contains(*b))
    }
}

/// A language of byte strings.
#[derive(Clone, Debug)]
pub(super) enum Language {
    /// One byte of the set.
    Byte(ByteSet),
    /// One after the other.
    Sequence(Vec<Language>),
    /// Any one of them.
    Choice(Vec<Language>),
    /// Any number of times, none included.
    Repeat(Box<Language>),
    /// The same; but what can really come is not known, and less.
    Loose(Box<Language>),
}

fn byte(holds: impl Fn(u8) -> bool) -> Language {
    Language::Byte((0..=u8::MAX).filter(|byte| holds(*byte)).collect())
}

fn optional(language: Language) -> Language {
    Language::Choice(vec![Language::Sequence(vec![]), language])
}

fn repeat(language: Language) -> Language {
    Language::Repeat(Box::new(language))
}

fn times(count: usize, language: Language) -> Language {
    Language::Sequence(vec![language; count])
}

fn digit() -> Language {
    byte(|b| b.is_ascii_digit())
}

fn lower_hex() -> Language {
    byte(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f'))
}

fn digits() -> Language {
    Language::Sequence(vec![digit(), repeat(digit())])
}

fn fraction() -> Language {
    optional(Language::Sequence(vec![Language::literal(b"."), digits()]))
}

impl Language {
    /// Exactly these bytes.
    pub(super) fn literal(bytes: &[u8]) -> Self {
        Self::Sequence(bytes.iter().map(|byte| Self::Byte(ByteSet::from_iter([*byte]))).collect())
    }

    /// Any bytes at all.
    pub(super) fn anything() -> Self {
        Self::Loose(Box::new(repeat(byte(|_| true))))
    }

    /// Whether it is no larger than what can come: no text of unknown form is in it.
    pub(super) fn is_exact(&self) -> bool {
        match self {
            Self::Byte(_) => true,
            Self::Sequence(parts) | Self::Choice(parts) => parts.iter().all(Self::is_exact),
            Self::Repeat(part) => part.is_exact(),
            Self::Loose(_) => false,
        }
    }

    /// This one or the other.
    pub(super) fn or(self, other: Language) -> Self {
        Self::Choice(vec![self, other])
    }

    /// The text forms of a type, under the session settings of the replication connection (`DateStyle=ISO`,
    /// `TimeZone=UTC`, `extra_float_digits=1`); `base` is the OID behind all domains.
    pub(super) fn of_type(base: u32) -> Self {
        let sign = || optional(Self::literal(b"-"));
        let infinity = |name: &[u8]| Self::Sequence(vec![sign(), Self::literal(name)]);
        let number = |exponent: Language| {
            let finite = Self::Sequence(vec![sign(), digits(), fraction(), exponent]);
            Self::Choice(vec![finite, infinity(b"Infinity"), Self::literal(b"NaN")])
        };
        let two = || times(2, digit());
        let date = || {
            let year = Self::Sequence(vec![times(4, digit()), repeat(digit())]);
            Self::Sequence(vec![year, Self::literal(b"-"), two(), Self::literal(b"-"), two()])
        };
        let minutes = || Self::Sequence(vec![Self::literal(b":"), two()]);
        let time = || Self::Sequence(vec![two(), minutes(), minutes(), fraction()]);
        let offset = || {
            let seconds = optional(Self::Sequence(vec![minutes(), optional(minutes())]));
            Self::Sequence(vec![byte(|b| matches!(b, b'+' | b'-')), two(), seconds])
        };
        let era = || optional(Self::literal(b" BC"));
        let day =
            |rest: Vec<Language>| Self::Sequence([vec![date()], rest, vec![era()]].concat()).or(infinity(b"infinity"));
        let space = || Self::literal(b" ");
        match Type::from_oid(base) {
            Some(Type::INT2 | Type::INT4 | Type::INT8) => Self::Sequence(vec![sign(), digits()]),
            Some(Type::OID) => digits(),
            Some(Type::BOOL) => byte(|b| matches!(b, b't' | b'f')),
            Some(Type::NUMERIC) => number(Self::literal(b"")),
            Some(Type::FLOAT4 | Type::FLOAT8) => {
                let sign = byte(|b| matches!(b, b'+' | b'-'));
                number(optional(Self::Sequence(vec![Self::literal(b"e"), sign, digits()])))
            }
            Some(Type::UUID) => {
                let groups = [8, 4, 4, 4, 12].map(|length| times(length, lower_hex()));
                let dashed = groups.into_iter().flat_map(|group| [Self::literal(b"-"), group]).skip(1);
                Self::Sequence(dashed.collect())
            }
            Some(Type::DATE) => day(vec![]),
            Some(Type::TIME) => time(),
            Some(Type::TIMETZ) => Self::Sequence(vec![time(), offset()]),
            Some(Type::TIMESTAMP) => day(vec![space(), time()]),
            Some(Type::TIMESTAMPTZ) => day(vec![space(), time(), offset()]),
            Some(Type::BYTEA) => Self::Sequence(vec![Self::literal(b"\\x"), repeat(times(2, lower_hex()))]),
            _ => Self::anything(),
        }
    }

    /// What the filter makes of it.
    pub(super) fn filtered(self, filter: Filter) -> Self {
        match filter {
            Filter::Md5 => times(32, lower_hex()),
            Filter::Sha256 => times(64, lower_hex()),
            Filter::UrlEncode => self.map(&url_encoded),
            Filter::Lower => self.cased(u8::to_ascii_lowercase),
            Filter::Upper => self.cased(u8::to_ascii_uppercase),
        }
    }

    fn cased(self, change: fn(&u8) -> u8) -> Self {
        if self.is_ascii() {
            return self.map(&|set| Self::Byte(set.bytes().map(|byte| change(&byte)).collect()));
        }
        // Outside ASCII a change of case depends on the neighbours and changes lengths; but no letter that the change
        // would have changed is left.
        Self::Loose(Box::new(repeat(byte(|b| change(&b) == b))))
    }

    fn is_ascii(&self) -> bool {
        match self {
            Self::Byte(set) => set.is_ascii(),
            Self::Sequence(parts) | Self::Choice(parts) => parts.iter().all(Self::is_ascii),
            Self::Repeat(part) | Self::Loose(part) => part.is_ascii(),
        }
    }

    /// Every byte set replaced.
    fn map(self, change: &impl Fn(ByteSet) -> Language) -> Self {
        let all = |parts: Vec<Language>| parts.into_iter().map(|part| part.map(change)).collect();
        match self {
            Self::Byte(set) => change(set),
            Self::Sequence(parts) => Self::Sequence(all(parts)),
            Self::Choice(parts) => Self::Choice(all(parts)),
            Self::Repeat(part) => repeat(part.map(change)),
            Self::Loose(part) => Self::Loose(Box::new(part.map(change))),
        }
    }
}

/// The unreserved bytes of the set as they are, the others as `%XX`.
fn url_encoded(set: ByteSet) -> Language {
    let (kept, escaped): (Vec<u8>, Vec<u8>) = set.bytes().partition(|byte| is_unreserved(*byte));
    let hex = |nibble: u8| UPPER_HEX[usize::from(nibble)];
    let escapes = (0..16).filter(|high| escaped.iter().any(|byte| byte >> 4 == *high)).map(|high| {
        let low = escaped.iter().filter(|byte| **byte >> 4 == high).map(|byte| hex(byte & 15));
        Language::Sequence(vec![Language::literal(&[b'%', hex(high)]), Language::Byte(low.collect())])
    });
    let kept = (!kept.is_empty()).then(|| Language::Byte(kept.into_iter().collect()));
    Language::Choice(kept.into_iter().chain(escapes).collect())
}

/// The keys that a template can have made.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Pattern {
    /// The literal that all of them begin with.
    prefix: Box<[u8]>,
    /// How much of that is the prefix of `[redis]`.
    root: usize,
    /// Whether the prefix is the only key.
    constant: bool,
    /// No value of unknown form is in the keys.
    exact: bool,
    /// The first one is the start, which no byte enters.
    states: Vec<State>,
}

/// The byte that matched last.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    bytes: ByteSet,
    /// The piece of the template that it belongs to.
    piece: usize,
    next: Vec<usize>,
    accepting: bool,
}

impl std::fmt::Debug for ByteSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes: Vec<u8> = self.bytes().collect();
        write!(f, "{}", bytes.escape_ascii())
    }
}

impl Pattern {
    /// The prefix of `[redis]`, a literal, then the pieces one after the other.
    pub(super) fn under_prefix(prefix: &[u8], literal: &[u8], pieces: &[Language]) -> Self {
        Pattern { root: prefix.len(), ..Self::new(&[prefix, literal].concat(), pieces) }
    }

    /// `prefix`, then the pieces one after the other.
    pub(super) fn new(prefix: &[u8], pieces: &[Language]) -> Self {
        let start = State { bytes: ByteSet([0; 4]), piece: 0, next: Vec::new(), accepting: false };
        let (constant, exact) = (pieces.is_empty(), pieces.iter().all(Language::is_exact));
        let mut pattern = Pattern { prefix: prefix.into(), root: 0, constant, exact, states: vec![start] };
        let mut ends = pattern.append(&Language::literal(prefix), 0, vec![0]);
        for (index, piece) in pieces.iter().enumerate() {
            ends = pattern.append(piece, index + 1, ends);
        }
        for end in ends {
            pattern.states[end].accepting = true;
        }
        pattern
    }

    /// Every key that begins with it.
    pub fn beginning_with(prefix: &[u8]) -> Self {
        Self::new(prefix, &[Language::anything()])
    }

    /// The same keys under another prefix of `[redis]`.
    pub fn under(&self, prefix: &[u8]) -> Self {
        let literal = &self.prefix[self.root..];
        let mut moved = Self::under_prefix(prefix, literal, &[]);
        // The states of a literal are a chain, one for each byte behind the start; its end leads to everything else.
        let (old_end, new_end) = (self.prefix.len(), moved.prefix.len());
        let renumbered = |state: &State| {
            let next = state.next.iter().map(|next| next - old_end + new_end).collect();
            State { next, ..state.clone() }
        };
        moved.states[new_end] = State { bytes: moved.states[new_end].bytes, ..renumbered(&self.states[old_end]) };
        moved.states.extend(self.states[old_end + 1..].iter().map(renumbered));
        Pattern { constant: self.constant, exact: self.exact, ..moved }
    }

    /// Adds the language behind the states `from`; returns the states it may end in.
    fn append(&mut self, language: &Language, piece: usize, from: Vec<usize>) -> Vec<usize> {
        match language {
            Language::Byte(bytes) => {
                let state = self.states.len();
                self.states.push(State { bytes: *bytes, piece, next: Vec::new(), accepting: false });
                for before in from {
                    self.states[before].next.push(state);
                }
                vec![state]
            }
            Language::Sequence(parts) => parts.iter().fold(from, |from, part| self.append(part, piece, from)),
            Language::Choice(parts) => union(parts.iter().map(|part| self.append(part, piece, from.clone())).collect()),
            Language::Loose(part) => self.append(part, piece, from),
            Language::Repeat(part) => {
                let Some(&first) = from.first() else { return from };
                let known = self.states[first].next.len();
                let ends = self.append(part, piece, from.clone());
                // What follows any of `from` now is where the part begins, so that is also what follows its ends.
                let again = self.states[first].next[known..].to_vec();
                for end in &ends {
                    let next = &mut self.states[*end].next;
                    next.extend(again.iter().filter(|state| !next.contains(state)).copied().collect::<Vec<_>>());
                }
                union(vec![from, ends])
            }
        }
    }

    /// Whether the template can have made this key.
    pub fn matches(&self, key: &[u8]) -> bool {
        if !key.starts_with(&self.prefix) {
            return false;
        }
        // The prefix is a chain of states, one for each byte.
        let (mut alive, mut reached) = (vec![self.prefix.len()], Vec::new());
        for byte in &key[self.prefix.len()..] {
            for state in alive.drain(..) {
                for next in &self.states[state].next {
                    if self.states[*next].bytes.contains(*byte) && !reached.contains(next) {
                        reached.push(*next);
                    }
                }
            }
            std::mem::swap(&mut alive, &mut reached);
        }
        alive.iter().any(|state| self.states[*state].accepting)
    }

    /// What every such key begins with, `[redis] prefix` included.
    pub fn literal_prefix(&self) -> &[u8] {
        &self.prefix
    }

    /// Whether such a key can hardly be anybody else's: each value in it has a form that is known from its type or filter.
    /// A text has none: `user:{name}` claims an application's `user:1:cart` too.
    pub fn is_exact(&self) -> bool {
        self.exact
    }

    /// The only such key, where the template has no placeholder.
    pub fn only_key(&self) -> Option<&[u8]> {
        self.constant.then_some(&self.prefix)
    }

    /// A pattern for SCAN MATCH that every such key matches, and other keys too: look at each with
    /// [`Pattern::matches`]. The characters that `stringmatchlen` (`src/util.c` of Redis) knows are escaped.
    pub fn scan_glob(&self) -> Vec<u8> {
        let mut glob = Vec::with_capacity(self.prefix.len() + 1);
        for byte in &self.prefix {
            if br"[]*?\^-".contains(byte) {
                glob.push(b'\\');
            }
            glob.push(*byte);
        }
        if !self.constant {
            glob.push(b'*');
        }
        glob
    }

    /// A key that both templates can make, as short as possible.
    pub fn common_key(&self, other: &Pattern) -> Option<Vec<u8>> {
        // Of thousands of rules, each compared with each, most differ here.
        let (left, right) = (self.literal_prefix(), other.literal_prefix());
        if !left.starts_with(right) && !right.starts_with(left) {
            return None;
        }
        common_run(self, other, |_, _| true)
    }

    /// A key from which it cannot be told which bytes of it are those of this piece, counted from 0.
    pub(super) fn ambiguous_key(&self, piece: usize) -> Option<Vec<u8>> {
        let piece = piece + 1;
        common_run(self, self, |left, right| left != right && (left == piece || right == piece))
    }
}

/// As the pattern for SCAN.
impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.scan_glob()))
    }
}

fn union(sets: Vec<Vec<usize>>) -> Vec<usize> {
    let mut all = sets.concat();
    all.sort_unstable();
    all.dedup();
    all
}

/// The shortest key that both patterns match, if `differ` holds of the pieces that one of its bytes belongs to.
fn common_run(left: &Pattern, right: &Pattern, differ: impl Fn(usize, usize) -> bool) -> Option<Vec<u8>> {
    /// Two states that the same bytes lead to, and whether the runs have differed by then.
    struct Step {
        /// The step before, and the bytes that lead from there.
        from: Option<(usize, ByteSet)>,
        left: usize,
        right: usize,
        differed: bool,
    }
    let mut seen = vec![false; left.states.len() * right.states.len() * 2];
    let mut steps = vec![Step { from: None, left: 0, right: 0, differed: false }];
    let mut at = 0;
    while let Some(&Step { left: l, right: r, differed, .. }) = steps.get(at) {
        if differed && left.states[l].accepting && right.states[r].accepting {
            let back = std::iter::successors(steps[at].from, |(step, _)| steps[*step].from);
            let mut key: Vec<u8> = back.filter_map(|(_, bytes)| bytes.example()).collect();
            key.reverse();
            return Some(key);
        }
        for &next_l in &left.states[l].next {
            for &next_r in &right.states[r].next {
                let (to_l, to_r) = (&left.states[next_l], &right.states[next_r]);
                let bytes = to_l.bytes.intersection(&to_r.bytes);
                let differed = differed || differ(to_l.piece, to_r.piece);
                let pair = (next_l * right.states.len() + next_r) * 2 + usize::from(differed);
                if !bytes.is_empty() && !std::mem::replace(&mut seen[pair], true) {
                    steps.push(Step { from: Some((at, bytes)), left: next_l, right: next_r, differed });
                }
            }
        }
        at += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::strategy::Union;

    use super::*;

    fn language(ty: Type, filters: &[Filter]) -> Language {
        filters.iter().fold(Language::of_type(ty.oid()), |language, filter| language.filtered(*filter))
    }

    fn matches(language: Language, text: &str) -> bool {
        Pattern::new(b"", &[language]).matches(text.as_bytes())
    }

    #[test]
    fn text_forms_match_their_types() {
        let cases: &[(Type, &[&str], &[&str])] = &[
            (Type::INT4, &["0", "-17", "2147483647"], &["", "-", "1.5", "1a", " 1"]),
            (Type::OID, &["0", "4294967295"], &["-1", ""]),
            (Type::BOOL, &["t", "f"], &["", "true", "tf"]),
            (Type::NUMERIC, &["0.10", "-12", "NaN", "Infinity", "-Infinity"], &["1.", ".5", "1e5", "-NaN", ""]),
            (Type::FLOAT8, &["1e-07", "1.5e+300", "-0", "NaN", "-Infinity", "0.1"], &["1e5", "e+1", "1.e+1"]),
            (
                Type::UUID,
                &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
                &["A0EEBC99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc999c0b4ef8bb6d6bb9bd380a11"],
            ),
            (Type::DATE, &["2024-02-29", "0044-03-15 BC", "5874897-12-31", "-infinity"], &["24-02-29", "2024-2-29"]),
            (Type::TIME, &["24:00:00", "04:05:06.789"], &["4:05:06", "04:05"]),
            (Type::TIMETZ, &["04:05:06-08", "04:05:06.7+05:30", "04:05:06+05:53:28"], &["04:05:06"]),
            (Type::TIMESTAMP, &["2024-02-29 04:05:06.123", "infinity", "0044-03-15 00:00:00 BC"], &["2024-02-29"]),
            (Type::TIMESTAMPTZ, &["2024-02-29 04:05:06+00", "0044-03-15 00:00:00+00 BC"], &["2024-02-29 04:05:06"]),
            (Type::BYTEA, &["\\x", "\\xdeadbeef"], &["\\xabc", "abc"]),
            (Type::TEXT, &["", "any: {text}\n"], &[]),
        ];
        for (ty, yes, no) in cases {
            for text in *yes {
                assert!(matches(language(ty.clone(), &[]), text), "{ty}: {text}");
            }
            for text in *no {
                assert!(!matches(language(ty.clone(), &[]), text), "{ty}: {text}");
            }
        }
    }

    #[test]
    fn filters_change_the_language() {
        use Filter::{Lower, Md5, Sha256, Upper, UrlEncode};
        type Case<'a> = (Type, &'a [Filter], &'a [&'a str], &'a [&'a str]);
        let cases: &[Case<'_>] = &[
            (Type::TEXT, &[Md5], &["d41d8cd98f00b204e9800998ecf8427e"], &["", "D41D8CD98F00B204E9800998ECF8427E"]),
            (Type::TEXT, &[Md5, Upper], &["D41D8CD98F00B204E9800998ECF8427E"], &["d41d8cd98f00b204e9800998ecf8427e"]),
            (Type::INT8, &[Sha256], &[&"0".repeat(64)], &["17"]),
            (Type::TEXT, &[UrlEncode], &["", "a-b.c_d~e", "%C3%A9%20"], &["a b", "%", "%4", "%41", "%c3", "a:b"]),
            (Type::TEXT, &[UrlEncode, Lower], &["%c3%a9"], &["%C3"]),
            (Type::TEXT, &[Lower], &["é:x", ""], &["X"]),
            (Type::TEXT, &[Upper], &["É:X"], &["x"]),
            (
                Type::UUID,
                &[Upper],
                &["A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
                &["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
            ),
            (Type::TIME, &[UrlEncode], &["04%3A05%3A06"], &["04:05:06"]),
        ];
        for (ty, filters, yes, no) in cases {
            for text in *yes {
                assert!(matches(language(ty.clone(), filters), text), "{ty} {filters:?}: {text}");
            }
            for text in *no {
                assert!(!matches(language(ty.clone(), filters), text), "{ty} {filters:?}: {text}");
            }
        }
    }

    #[test]
    fn the_glob_escapes_what_redis_reads_in_patterns() {
        let pattern = Pattern::new(br"a[b]*?\^-:", &[language(Type::INT4, &[])]);
        assert_eq!(pattern.scan_glob(), br"a\[b\]\*\?\\\^\-:*");
        assert_eq!(pattern.only_key(), None);
        let constant = Pattern::new(b"feed:global", &[]);
        assert_eq!(constant.scan_glob(), b"feed:global");
        assert_eq!(constant.only_key(), Some(&b"feed:global"[..]));
    }

    #[test]
    fn only_values_of_known_form_are_exact() {
        use Filter::{Lower, Md5, Sha256, Upper, UrlEncode};
        let exact: &[(Type, &[Filter])] = &[
            (Type::INT4, &[]),
            (Type::UUID, &[Upper]),
            (Type::TIMESTAMPTZ, &[UrlEncode]),
            (Type::TEXT, &[Md5]),
            (Type::JSONB, &[Lower, Sha256]),
        ];
        let loose: &[(Type, &[Filter])] =
            &[(Type::TEXT, &[]), (Type::VARCHAR, &[UrlEncode]), (Type::TEXT, &[Lower]), (Type::INET, &[])];
        for (ty, filters) in exact {
            assert!(Pattern::new(b"k:", &[language(ty.clone(), filters)]).is_exact(), "{ty} {filters:?}");
        }
        for (ty, filters) in loose {
            let beside = [language(Type::INT4, &[]), language(ty.clone(), filters).or(Language::literal(b"none"))];
            assert!(!Pattern::new(b"k:", &beside).is_exact(), "{ty} {filters:?}");
        }
        assert!(Pattern::new(b"feed:global", &[]).is_exact());
        // A change of case outside ASCII makes more of a literal than it was.
        assert!(!Pattern::new(b"k:", &[Language::literal("é".as_bytes()).filtered(Upper)]).is_exact());
    }

    #[test]
    fn common_keys_are_found_where_there_are_some() {
        let text = || language(Type::TEXT, &[]);
        let int = || language(Type::INT4, &[]);
        let lit = |literal: &str| Language::literal(literal.as_bytes());
        let cases = [
            ("user:", vec![int()], "user:", vec![text(), lit(":cart")], None),
            ("user:", vec![text()], "user:", vec![int(), lit(":cart")], Some("user:1:cart")),
            ("user:", vec![int()], "users:", vec![int()], None),
            ("a:", vec![int()], "a:", vec![language(Type::UUID, &[])], None),
            ("a:", vec![int()], "a:", vec![language(Type::DATE, &[])], None),
            ("a:", vec![text()], "a:b:", vec![text()], Some("a:b:")),
            ("a:", vec![language(Type::TEXT, &[Filter::UrlEncode])], "a:b:", vec![text()], None),
            ("a:", vec![], "a:", vec![int()], None),
            ("a:", vec![], "a:", vec![text()], Some("a:")),
        ];
        for (one, pieces, other, others, expected) in cases {
            let (left, right) = (Pattern::new(one.as_bytes(), &pieces), Pattern::new(other.as_bytes(), &others));
            let expected = expected.map(|key| key.as_bytes().to_vec());
            assert_eq!(left.common_key(&right), expected, "{one} {other}");
            assert_eq!(right.common_key(&left).is_some(), expected.is_some(), "{other} {one}");
        }
    }

    #[test]
    fn values_that_run_into_each_other_are_ambiguous() {
        let text = || language(Type::TEXT, &[]);
        let int = || language(Type::INT4, &[]);
        let encoded = || language(Type::TEXT, &[Filter::UrlEncode]);
        let colon = || Language::literal(b":");
        let cases = [
            (vec![int(), int()], 0, true),
            (vec![int(), colon(), int()], 0, false),
            (vec![text(), colon(), int()], 0, false),
            (vec![int(), colon(), text()], 2, false),
            (vec![text(), colon(), text()], 0, true),
            (vec![encoded(), colon(), text()], 0, false),
            (vec![encoded(), Language::literal(b"-"), encoded()], 0, true),
            // The integer is always told, whatever the two texts behind it do.
            (vec![int(), colon(), text(), colon(), text()], 0, false),
            (vec![int(), colon(), text(), colon(), text()], 2, true),
            (vec![language(Type::TEXT, &[Filter::Md5]), language(Type::TEXT, &[Filter::Md5])], 0, false),
        ];
        for (pieces, piece, expected) in cases {
            assert_eq!(Pattern::new(b"k:", &pieces).ambiguous_key(piece).is_some(), expected, "{piece}");
        }
    }

    #[test]
    fn a_match_takes_time_in_proportion_to_the_key() {
        let texts = vec![language(Type::TEXT, &[]); 20];
        let pieces: Vec<Language> = texts.into_iter().flat_map(|text| [text, Language::literal(b":")]).collect();
        let key = ["k", &":".repeat(3_000), "x"].concat();
        assert!(!Pattern::new(b"k", &pieces).matches(key.as_bytes()));
    }

    /// Small enough alphabets that chance finds what two languages have in common.
    fn any_language() -> impl Strategy<Value = Language> {
        let set = prop::sample::select(vec!["a", "b", ":", "ab", "a:", "ab:"]);
        let leaf = set.prop_map(|set| byte(|b| set.as_bytes().contains(&b)));
        leaf.prop_recursive(3, 12, 3, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..3).prop_map(Language::Sequence),
                prop::collection::vec(inner.clone(), 1..3).prop_map(Language::Choice),
                inner.prop_map(repeat),
            ]
        })
    }

    /// A member of the language.
    fn member(language: &Language) -> BoxedStrategy<Vec<u8>> {
        match language {
            Language::Byte(set) => {
                let bytes: Vec<u8> = set.bytes().collect();
                prop::sample::select(bytes).prop_map(|b| vec![b]).boxed()
            }
            Language::Sequence(parts) => {
                parts.iter().map(member).collect::<Vec<_>>().prop_map(|parts| parts.concat()).boxed()
            }
            Language::Choice(parts) => Union::new(parts.iter().map(member)).boxed(),
            Language::Loose(part) => member(part),
            Language::Repeat(part) => {
                prop::collection::vec(member(part), 0..4).prop_map(|parts| parts.concat()).boxed()
            }
        }
    }

    /// Every way to cut the key into members of the pieces: the lengths of the cuts.
    fn readings(key: &[u8], pieces: &[Language]) -> Vec<Vec<usize>> {
        let Some((first, rest)) = pieces.split_first() else {
            return if key.is_empty() { vec![vec![]] } else { vec![] };
        };
        let first = Pattern::new(b"", std::slice::from_ref(first));
        let cuts = (0..=key.len()).filter(|cut| first.matches(&key[..*cut]));
        cuts.flat_map(|cut| readings(&key[cut..], rest).into_iter().map(move |rest| [vec![cut], rest].concat()))
            .collect()
    }

    /// The bytes of the piece in this reading.
    fn extent(reading: &[usize], piece: usize) -> (usize, usize) {
        let start = reading[..piece].iter().sum();
        (start, start + reading[piece])
    }

    proptest! {
        #[test]
        fn members_match(
            (language, member) in any_language().prop_flat_map(|language| {
                let member = member(&language);
                (Just(language), member)
            })
        ) {
            prop_assert!(Pattern::new(b"", &[language]).matches(&member));
        }

        #[test]
        fn under_another_prefix_it_is_as_if_made_there(
            (pieces, key) in prop::collection::vec(any_language(), 0..3).prop_flat_map(|pieces| {
                let key = member(&Language::Sequence(pieces.clone()));
                (Just(pieces), key)
            }),
            (from, to, literal) in ("[ab:]{0,3}", "[ab:]{0,3}", "[ab:]{0,2}"),
            stray in "[ab:]{0,6}",
        ) {
            let at = |prefix: &str| Pattern::under_prefix(prefix.as_bytes(), literal.as_bytes(), &pieces);
            let (moved, made) = (at(&from).under(to.as_bytes()), at(&to));
            prop_assert!(moved.matches(&[to.as_bytes(), literal.as_bytes(), &key].concat()));
            prop_assert_eq!(moved.matches(stray.as_bytes()), made.matches(stray.as_bytes()));
            prop_assert_eq!((moved.scan_glob(), moved.only_key()), (made.scan_glob(), made.only_key()));
            prop_assert_eq!(moved.under(from.as_bytes()).scan_glob(), at(&from).scan_glob());
        }

        #[test]
        fn overlaps_agree_with_samples(
            (one, other, samples) in (any_language(), any_language()).prop_flat_map(|(one, other)| {
                let samples = prop::collection::vec(member(&one), 20);
                (Just(one), Just(other), samples)
            })
        ) {
            let (one, other) = (Pattern::new(b"k:", &[one]), Pattern::new(b"k:", &[other]));
            let common = one.common_key(&other);
            if let Some(key) = &common {
                prop_assert!(one.matches(key) && other.matches(key));
            }
            for sample in samples {
                let key = [b"k:", sample.as_slice()].concat();
                prop_assert!(one.matches(&key));
                prop_assert!(!other.matches(&key) || common.is_some(), "{}", key.escape_ascii());
            }
        }

        #[test]
        fn ambiguity_agrees_with_readings(
            (pieces, key) in prop::collection::vec(any_language(), 1..4).prop_flat_map(|pieces| {
                let key = member(&Language::Sequence(pieces.clone()));
                (Just(pieces), key)
            })
        ) {
            let pattern = Pattern::new(b"", &pieces);
            let varies = |key: &[u8], piece| {
                let readings = readings(key, &pieces);
                let bytes = |reading: &Vec<usize>| {
                    let (start, end) = extent(reading, piece);
                    // Where an empty value stands makes no difference.
                    if start == end { (0, 0) } else { (start, end) }
                };
                readings.iter().any(|reading| bytes(reading) != bytes(&readings[0]))
            };
            for piece in 0..pieces.len() {
                match pattern.ambiguous_key(piece) {
                    Some(key) => prop_assert!(varies(&key, piece), "{} {piece}", key.escape_ascii()),
                    None => prop_assert!(!varies(&key, piece), "{} {piece}", key.escape_ascii()),
                }
            }
        }
    }
}
