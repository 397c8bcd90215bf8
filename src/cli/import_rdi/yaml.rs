//! A YAML file as a tree whose nodes know their line.
//!
//! Scalars stay as they are written: nothing here depends on what YAML takes for a number. Aliases and several documents
//! in a file are refused; no job needs them, and an alias can make a small file large.

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput};

/// How deep lists and maps may lie in each other.
const DEPTH_MAX: usize = 64;

/// A value and its line, from 1 on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Null,
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

impl Node {
    /// The value of a key, if this is a map that has it and it is not null.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        self.entries().iter().find(|(own, node)| own == key && node.value != Value::Null).map(|(_, node)| node)
    }

    pub(super) fn text(&self) -> Option<&str> {
        if let Value::Text(text) = &self.value { Some(text) } else { None }
    }

    /// The text behind a key.
    pub(super) fn text_of(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Node::text)
    }

    /// The items of a list; of anything else none.
    pub(super) fn items(&self) -> &[Node] {
        if let Value::List(items) = &self.value { items } else { &[] }
    }

    /// The entries of a map; of anything else none.
    pub(super) fn entries(&self) -> &[(String, Node)] {
        if let Value::Map(entries) = &self.value { entries } else { &[] }
    }
}

/// A file is not YAML, or not of the kind that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) line: usize,
    pub(super) message: String,
}

impl Fault {
    fn new(line: usize, message: impl Into<String>) -> Self {
        Fault { line, message: message.into() }
    }
}

/// Reads a file; an empty one is null.
pub(super) fn read(text: &str) -> Result<Node, Fault> {
    let mut reader = Reader { parser: Parser::new_from_str(text) };
    let mut root = None;
    loop {
        let (event, span) = reader.next()?;
        match event {
            Event::StreamEnd => break,
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
            _ if root.is_some() => {
                return Err(Fault::new(span.start.line(), "a second document in the file is not read"));
            }
            event => root = Some(reader.node(event, span, 0)?),
        }
    }
    Ok(root.unwrap_or(Node { line: 1, value: Value::Null }))
}

struct Reader<'t> {
    parser: Parser<'t, StrInput<'t>>,
}

impl<'t> Reader<'t> {
    fn next(&mut self) -> Result<(Event<'t>, Span), Fault> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(Fault::new(error.marker().line(), error.info())),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    /// The node that begins with this event.
    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, Fault> {
        let line = span.start.line();
        if depth > DEPTH_MAX {
            return Err(Fault::new(line, format!("more than {DEPTH_MAX} lists and maps lie in each other")));
        }
        let value = match event {
            Event::Scalar(text, ScalarStyle::Plain, ..) if matches!(text.as_ref(), "" | "~" | "null") => Value::Null,
            Event::Scalar(text, ..) => Value::Text(text.into_owned()),
            Event::SequenceStart(..) => Value::List(self.items(depth)?),
            Event::MappingStart(..) => Value::Map(self.entries(depth)?),
            Event::Alias(_) => {
                return Err(Fault::new(line, "an alias (`*name`) is not read: write out what it stands for"));
            }
            _ => return Err(Fault::new(line, "the file ends too early")),
        };
        Ok(Node { line, value })
    }

    fn items(&mut self, depth: usize) -> Result<Vec<Node>, Fault> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn entries(&mut self, depth: usize) -> Result<Vec<(String, Node)>, Fault> {
        let mut entries = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                return Ok(entries);
            }
            let key = self.node(event, span, depth + 1)?;
            let Value::Text(name) = key.value else {
                return Err(Fault::new(key.line, "this key is no text"));
            };
            let (event, span) = self.next()?;
            entries.push((name, self.node(event, span, depth + 1)?));
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nodes_know_their_lines() {
        let root = read("# a job\nsource:\n  table: invoice\noutput:\n  - uses: redis.write\n    expire: 100\n  - ~\n")
            .unwrap();
        assert_eq!(root.get("source").unwrap().text_of("table"), Some("invoice"));
        let items = root.get("output").unwrap().items();
        let expire = items[0].get("expire").unwrap();
        assert_eq!((expire.line, expire.text()), (6, Some("100")));
        assert_eq!(items[1].value, Value::Null);
        assert_eq!(read("").unwrap().value, Value::Null);
    }

    #[test]
    fn what_is_not_read_is_named_with_its_line() {
        let fault = |text: &str| read(text).unwrap_err();
        assert_eq!(fault("a: 1\nb: ]\nc: 2\n").line, 2);
        assert!(fault("a: &x 1\nb: *x").message.contains("alias"));
        assert!(fault("a: 1\n---\nb: 2").message.contains("second document"));
        assert!(fault(&"[".repeat(100)).message.contains("lie in each other"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "([-:{}\\[\\]&*#|>'\"\\n ]|[a-c]|\\PC){0,60}") {
            let _ = read(&text);
        }
    }
}
