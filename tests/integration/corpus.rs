//! The fuzz targets' corpus and random changes of it, for compilers that cannot fuzz.

use std::fs;
use std::path::Path;

use keepstep::decode::pgoutput;
use proptest::prelude::*;
use proptest::sample::{Index, select};

#[path = "../fuzz/checks.rs"]
mod checks;

/// The files of one target's corpus, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
    let files = entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()));
    let files: Vec<_> = files.collect();
    assert!(files.len() > 20);
    files
}

/// What a fuzzer does to bytes, in small.
#[derive(Clone, Debug)]
enum Mutation {
    Set(Index, u8),
    Insert(Index, u8),
    Cut(Index, Index),
    Repeat(Index, Index),
    Truncate(Index),
}

impl Mutation {
    fn any() -> impl Strategy<Value = Self> {
        let byte = || prop_oneof![any::<u8>(), select(&b"\0\x01\x7f\xff\"\\{}(),;= NUtnuNKO"[..])];
        prop_oneof![
            (any::<Index>(), byte()).prop_map(|(at, byte)| Self::Set(at, byte)),
            (any::<Index>(), byte()).prop_map(|(at, byte)| Self::Insert(at, byte)),
            any::<(Index, Index)>().prop_map(|(from, to)| Self::Cut(from, to)),
            any::<(Index, Index)>().prop_map(|(from, to)| Self::Repeat(from, to)),
            any::<Index>().prop_map(Self::Truncate),
        ]
    }

    fn apply(self, bytes: &mut Vec<u8>) {
        let range = |from: Index, to: Index| {
            let (from, to) = (from.index(bytes.len() + 1), to.index(bytes.len() + 1));
            from.min(to)..from.max(to)
        };
        match self {
            Self::Set(..) if bytes.is_empty() => {}
            Self::Set(at, byte) => *at.get_mut(bytes) = byte,
            Self::Insert(at, byte) => bytes.insert(at.index(bytes.len() + 1), byte),
            Self::Cut(from, to) => drop(bytes.drain(range(from, to))),
            Self::Repeat(from, to) => bytes.extend_from_within(range(from, to)),
            Self::Truncate(at) => bytes.truncate(at.index(bytes.len() + 1)),
        }
    }
}

fn mutants(target: &str) -> impl Strategy<Value = Vec<u8>> + use<> {
    let files: Vec<Vec<u8>> = corpus(target).into_iter().map(|(_, bytes)| bytes).collect();
    (select(files), proptest::collection::vec(Mutation::any(), 1..6)).prop_map(|(mut bytes, mutations)| {
        mutations.into_iter().for_each(|mutation| mutation.apply(&mut bytes));
        bytes
    })
}

#[test]
fn corpus_holds() {
    for (name, frame) in corpus("pgoutput") {
        checks::pgoutput(&frame);
        let read = pgoutput::parse(&frame);
        assert!(read.is_ok() || !name.starts_with("captured-"), "{name}: {read:?}");
    }
    corpus("value").iter().for_each(|(_, input)| checks::value(input));
    corpus("expression").iter().for_each(|(_, input)| checks::expression(input));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_frame_is_read_or_refused(frame in mutants("pgoutput")) {
        checks::pgoutput(&frame);
    }

    #[test]
    fn any_expression_is_evaluated_or_refused(input in mutants("expression")) {
        checks::expression(&input);
    }

    #[test]
    fn any_text_form_is_shown_or_refused(input in mutants("value")) {
        checks::value(&input);
    }
}
