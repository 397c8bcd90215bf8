//! A problem in the rules file, shown as rustc shows one: the line, the characters, the fix.

use std::ops::Range;

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it stops the daemon.
    pub severity: Severity,
    /// What is wrong, in one sentence without a full stop.
    pub title: String,
    /// Where, and what is wrong just there.
    pub primary: Label,
    /// Other places that explain it.
    pub context: Vec<Label>,
    /// What to do, most likely remedy first; can be pasted.
    pub help: Vec<String>,
}

/// Whether a problem stops the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It does.
    Error,
    /// It does not.
    Warning,
}

/// A place in the rules file and what to say of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// Bytes of the file.
    pub span: Range<usize>,
    /// What to say; may be empty.
    pub text: String,
}
