//! What is wrong with a text, before it is known where in the file the text stands.

use std::ops::Range;

use super::code::Code;

/// What is wrong with a text, and where; the field's name stands before `problem`.
///
/// It never repeats the text: that may be a secret from the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mistake {
    /// What kind of mistake it is.
    pub(super) code: Code,
    /// The wrong bytes of the text.
    pub(super) range: Range<usize>,
    /// Goes on after the name: `has no unit`.
    pub(super) problem: String,
    /// What to say at the place; may be empty.
    pub(super) label: String,
    /// What to do.
    pub(super) help: Vec<String>,
}

impl Mistake {
    /// A mistake of the whole `text`.
    pub(super) fn whole(code: Code, text: &str, problem: impl Into<String>) -> Self {
        Mistake { code, range: 0..text.len(), problem: problem.into(), label: String::new(), help: Vec::new() }
    }

    /// Says something at the place.
    pub(super) fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// Adds what to do about it.
    pub(super) fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }
}
