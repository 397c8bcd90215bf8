//! The rules file and those that it includes, as if they were one text: a span is a place in all of them, one after the
//! other. So whatever has a span need not say which file it means, and a message can point into several.

use std::ops::Range;

use super::RulesFile;

/// A rules file and those that it includes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// The rules file itself.
    pub main: RulesFile,
    /// The files that `include` names, in the order in which they are read.
    pub included: Vec<RulesFile>,
}

impl From<RulesFile> for Sources {
    fn from(main: RulesFile) -> Self {
        Sources { main, included: Vec::new() }
    }
}

impl Sources {
    /// Each file, and the place at which its text begins.
    pub fn files(&self) -> impl Iterator<Item = (usize, &RulesFile)> {
        // One more than its bytes, so that the end of a file is not the beginning of the next one.
        std::iter::once(&self.main).chain(&self.included).scan(0, |next, file| {
            let start = *next;
            *next += file.text.len() + 1;
            Some((start, file))
        })
    }

    /// The place behind the last file.
    pub(super) fn end(&self) -> usize {
        self.files().last().map_or(0, |(start, file)| start + file.text.len())
    }

    /// What stands at a span; nothing where none is.
    pub(super) fn text(&self, span: &Range<usize>) -> &str {
        let home = self.files().take_while(|(start, _)| *start <= span.start).last();
        home.and_then(|(start, file)| file.text.get(span.start - start..span.end - start)).unwrap_or_default()
    }
}
