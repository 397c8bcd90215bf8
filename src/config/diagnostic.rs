//! A problem in the rules file, shown as rustc shows one: the line, the characters, the fix.
//!
//! Reading the file and binding its rules to tables make the same [`Diagnostic`]s, and [`render`] is the only place
//! that turns them into text. What it shows of the file is masked first (`config::mask`), so no password that
//! somebody wrote into the file itself is ever printed; titles and labels are too, which may repeat a name from it.

use std::ops::Range;

use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use super::RulesFile;
use super::code::Code;
use super::mask::mask;

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
    /// Bytes of the file, on character boundaries.
    pub span: Range<usize>,
    /// What to say; may be empty.
    pub text: String,
}

/// So many problems are shown at once; nobody reads more before mending these.
const SHOWN_MAX: usize = 100;

/// The problems as text for a terminal, a blank line between two; every span must lie in `file`.
pub fn render(diagnostics: &[Diagnostic], file: &RulesFile, color: bool) -> String {
    let renderer = if color { Renderer::styled() } else { Renderer::plain() };
    let path = file.path.display().to_string();
    let source = mask(&file.text);
    let shown = diagnostics.iter().take(SHOWN_MAX);
    let mut blocks: Vec<String> =
        shown.map(|diagnostic| renderer.render(&groups(diagnostic, &path, &source)) + "\n").collect();
    if let Some(more) = diagnostics.len().checked_sub(SHOWN_MAX).filter(|more| *more > 0) {
        blocks.push(format!("… and {more} more\n"));
    }
    blocks.join("\n")
}

/// The message with the place, then one group for each remedy.
fn groups<'a>(diagnostic: &'a Diagnostic, path: &'a str, source: &'a str) -> Vec<Group<'a>> {
    let level = match diagnostic.severity {
        Severity::Error => Level::ERROR,
        Severity::Warning => Level::WARNING,
    };
    let title = Group::with_title(level.primary_title(mask(&diagnostic.title)).id(diagnostic.code.to_string()));
    let message = if source.is_empty() {
        title.element(Origin::path(path))
    } else {
        let context = diagnostic.context.iter().map(|label| annotation(AnnotationKind::Context, label));
        let snippet =
            Snippet::source(source).path(path).annotation(annotation(AnnotationKind::Primary, &diagnostic.primary));
        title.element(snippet.annotations(context))
    };
    let help = diagnostic.help.iter().map(|help| Group::with_title(Level::HELP.secondary_title(help.as_str())));
    std::iter::once(message).chain(help).collect()
}

fn annotation(kind: AnnotationKind, label: &Label) -> Annotation<'_> {
    let text = (!label.text.is_empty()).then(|| mask(&label.text));
    kind.span(label.span.clone()).label(text)
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
        insta::assert_snapshot!(render(&[diagnostic], &file, false));
    }

    #[test]
    fn no_more_are_shown_than_anybody_reads() {
        let file = RulesFile { path: "keepstep.toml".into(), text: "a".to_owned() };
        let many = vec![Diagnostic::warning(Code::KeysGo, "problem", 0..1, ""); SHOWN_MAX + 2];
        let shown = render(&many, &file, false);
        assert_eq!(shown.matches("warning[KS044]: problem").count(), SHOWN_MAX);
        assert!(shown.ends_with("\n… and 2 more\n"), "{shown}");
        assert!(!render(&many[..SHOWN_MAX], &file, false).contains("more"));
    }
}
