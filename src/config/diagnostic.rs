//! A problem in the rules file, shown as rustc shows one: the line, the characters, the fix.
//!
//! Reading the file and binding its rules to tables make the same [`Diagnostic`]s, and [`render`] is the only place
//! that turns them into text. What it shows of the file is masked first (`config::mask`), so no password that
//! somebody wrote into the file itself is ever printed; titles and labels are too, which may repeat a name from it.

use std::ops::Range;

use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use super::code::Code;
use super::mask::mask;
use super::{RulesFile, Sources};

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it stops the daemon.
    pub severity: Severity,
    /// What kind of mistake it is.
    pub code: Code,
    /// What is wrong, in one sentence without a full stop.
    pub title: String,
    /// Where, and what is wrong just there.
    pub primary: Label,
    /// Other places that explain it.
    pub context: Vec<Label>,
    /// What to do, most likely remedy first; can be pasted.
    pub help: Vec<String>,
}

impl Diagnostic {
    /// A problem that stops the daemon; `label` says what is wrong just at `span` and may be empty.
    pub fn error(code: Code, title: impl Into<String>, span: Range<usize>, label: impl Into<String>) -> Self {
        let primary = Label { span, text: label.into() };
        let (title, context, help) = (title.into(), Vec::new(), Vec::new());
        Diagnostic { severity: Severity::Error, code, title, primary, context, help }
    }

    /// A problem that does not.
    pub fn warning(code: Code, title: impl Into<String>, span: Range<usize>, label: impl Into<String>) -> Self {
        Diagnostic { severity: Severity::Warning, ..Self::error(code, title, span, label) }
    }

    /// Adds another place that explains it.
    #[must_use]
    pub fn context(mut self, span: Range<usize>, label: impl Into<String>) -> Self {
        self.context.push(Label { span, text: label.into() });
        self
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }

    /// The same, of a text that stands `by` bytes further behind.
    pub(super) fn moved(mut self, by: usize) -> Self {
        for Label { span, .. } in std::iter::once(&mut self.primary).chain(&mut self.context) {
            *span = span.start + by..span.end + by;
        }
        self
    }
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
    /// Bytes of the [`Sources`], on character boundaries.
    pub span: Range<usize>,
    /// What to say; may be empty.
    pub text: String,
}

/// So many problems are shown at once; nobody reads more before mending these.
const SHOWN_MAX: usize = 100;

/// The problems as text for a terminal, a blank line between two; every span must lie in one of the files.
pub fn render(diagnostics: &[Diagnostic], files: &Sources, color: bool) -> String {
    let renderer = if color { Renderer::styled() } else { Renderer::plain() };
    let files: Vec<Shown> = files.files().map(Shown::new).collect();
    let shown = diagnostics.iter().take(SHOWN_MAX);
    let mut blocks: Vec<String> = shown.map(|diagnostic| renderer.render(&groups(diagnostic, &files)) + "\n").collect();
    if let Some(more) = diagnostics.len().checked_sub(SHOWN_MAX).filter(|more| *more > 0) {
        blocks.push(format!("… and {more} more\n"));
    }
    blocks.join("\n")
}

/// A file as it is shown.
struct Shown {
    /// Where its text begins.
    start: usize,
    path: String,
    masked: String,
}

impl Shown {
    fn new((start, file): (usize, &RulesFile)) -> Self {
        Shown { start, path: file.path.display().to_string(), masked: mask(&file.text) }
    }

    fn holds(&self, label: &Label) -> bool {
        (self.start..=self.start + self.masked.len()).contains(&label.span.start)
    }

    fn annotation<'a>(&self, kind: AnnotationKind, label: &'a Label) -> Annotation<'a> {
        let text = (!label.text.is_empty()).then(|| mask(&label.text));
        kind.span(label.span.start - self.start..label.span.end - self.start).label(text)
    }

    /// What is said of this file.
    fn snippet<'a>(&'a self, diagnostic: &'a Diagnostic) -> Option<Snippet<'a, Annotation<'a>>> {
        let primary = Some(&diagnostic.primary).filter(|label| self.holds(label));
        let context = diagnostic.context.iter().filter(|label| self.holds(label));
        let labels = primary.map(|label| self.annotation(AnnotationKind::Primary, label));
        let labels: Vec<_> =
            labels.into_iter().chain(context.map(|label| self.annotation(AnnotationKind::Context, label))).collect();
        let snippet = || Snippet::source(self.masked.as_str()).path(self.path.as_str());
        (!labels.is_empty()).then(|| snippet().annotations(labels))
    }
}

/// The message with its places, then one group for each remedy.
fn groups<'a>(diagnostic: &'a Diagnostic, files: &'a [Shown]) -> Vec<Group<'a>> {
    let level = match diagnostic.severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    let title = Group::with_title(level.primary_title(mask(&diagnostic.title)).id(diagnostic.code.to_string()));
    let (home, others): (Vec<&Shown>, Vec<&Shown>) = files.iter().partition(|file| file.holds(&diagnostic.primary));
    let message = home.into_iter().chain(others).fold(title, |message, file| match file.snippet(diagnostic) {
        Some(_) if file.masked.is_empty() => message.element(Origin::path(file.path.as_str())),
        Some(snippet) => message.element(snippet),
        None => message,
    });
    let help = diagnostic.help.iter().map(|help| Group::with_title(Level::HELP.secondary_title(help.as_str())));
    std::iter::once(message).chain(help).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_shows_places_labels_and_remedies() {
        let text = "[rule.order-lines]\ntable  = \"public.order_lines\"\n\ndelete = [\"order:{order_id}:lines\"]\n";
        let file = RulesFile { path: "keepstep.toml".into(), text: text.to_owned() };
        let diagnostic = Diagnostic::error(
            Code::NotInIdentity,
            "rule `order-lines` needs column `order_id` on DELETE, but Postgres will not send it",
            67..77,
            "not part of the table's replica identity",
        )
        .context(28..48, "REPLICA IDENTITY DEFAULT: only (id) is sent for the old row")
        .help("make Postgres log the old row:  ALTER TABLE public.order_lines REPLICA IDENTITY FULL;")
        .help("or limit the rule to what it can do:  on = [\"insert\", \"update\"]");
        insta::assert_snapshot!(render(&[diagnostic], &file.into(), false));
    }

    #[test]
    fn no_more_are_shown_than_anybody_reads() {
        let file = Sources::from(RulesFile { path: "keepstep.toml".into(), text: "a".to_owned() });
        let many = vec![Diagnostic::warning(Code::KeysGo, "problem", 0..1, ""); SHOWN_MAX + 2];
        let shown = render(&many, &file, false);
        assert_eq!(shown.matches("warning[KS044]: problem").count(), SHOWN_MAX);
        assert!(shown.ends_with("\n… and 2 more\n"), "{shown}");
        assert!(!render(&many[..SHOWN_MAX], &file, false).contains("more"));
    }
}
