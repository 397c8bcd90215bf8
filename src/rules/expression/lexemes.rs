//! The words and signs of an expression: enough to bound what the parser is given, to find the end of a bracket, and to
//! see SQL where CEL was meant.

use std::ops::Range;

use super::ExpressionError;

/// The longest text of an expression, in bytes.
pub(super) const EXPRESSION_BYTES_MAX: usize = 8192;

/// How deep an expression may nest, as [`depth`] counts it. The parser goes one level down the stack for each.
pub(super) const DEPTH_MAX: usize = 96;

/// What a bracket, with everything that can stand in one, costs more than an operator.
const BRACKET_DEPTH: usize = 4;

/// What stands at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A name, a keyword or a number.
    Word,
    /// In quotes.
    Text,
    /// Anything else, one character each.
    Sign,
}

#[derive(Clone, Debug)]
pub(super) struct Lexeme {
    pub(super) kind: Kind,
    pub(super) range: Range<usize>,
}

/// Takes a text apart; space and comments are left out.
pub(super) fn lexemes(text: &str) -> Result<Vec<Lexeme>, ExpressionError> {
    if text.len() > EXPRESSION_BYTES_MAX {
        let problem = format!("is longer than {EXPRESSION_BYTES_MAX} bytes");
        return Err(ExpressionError::new(0..text.len(), problem).help("put what it says into a column of the table"));
    }
    let mut lexemes = Vec::new();
    let mut at = 0;
    while let Some(first) = text[at..].chars().next() {
        let rest = &text[at..];
        let (kind, length) = if first.is_whitespace() {
            (None, first.len_utf8())
        } else if rest.starts_with("//") {
            (None, rest.find('\n').unwrap_or(rest.len()))
        } else if let Some(opening) = opening_quote(rest) {
            (Some(Kind::Text), quoted_length(rest, opening).ok_or_else(|| unclosed(at, opening))?)
        } else if is_word(first) {
            (Some(Kind::Word), rest.find(|c| !is_word(c)).unwrap_or(rest.len()))
        } else {
            (Some(Kind::Sign), first.len_utf8())
        };
        lexemes.extend(kind.map(|kind| Lexeme { kind, range: at..at + length }));
        at += length;
    }
    if depth(text, &lexemes) > DEPTH_MAX {
        return Err(ExpressionError::new(0..text.len(), "nests too deep").help("put a part of it into another rule"));
    }
    Ok(lexemes)
}

/// How deep an expression nests at most: the operators, points and brackets that stand around a place. Those of a chain
/// nest in each other too (`a + b + c` is `(a + b) + c`), but `&&`, `||`, `,` and `? :` begin anew.
fn depth(text: &str, lexemes: &[Lexeme]) -> usize {
    let (mut open, mut chain, mut deepest) = (Vec::new(), 0, 0);
    for lexeme in lexemes.iter().filter(|lexeme| lexeme.kind == Kind::Sign) {
        match &text[lexeme.range.clone()] {
            "(" | "[" | "{" => {
                open.push(chain);
                chain = 0;
            }
            ")" | "]" | "}" => chain = open.pop().unwrap_or(0) + 1,
            "&" | "|" | "," | "?" | ":" => chain = 0,
            _ => chain += 1,
        }
        deepest = deepest.max(open.iter().sum::<usize>() + open.len() * BRACKET_DEPTH + chain);
    }
    deepest
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// A text's opening: the letters before its quotes, and the quotes.
#[derive(Clone, Copy)]
struct Opening<'t> {
    prefix: &'t str,
    quotes: &'t str,
}

fn opening_quote(rest: &str) -> Option<Opening<'_>> {
    let letters = rest.bytes().take_while(|byte| matches!(byte, b'r' | b'R' | b'b' | b'B')).count();
    let (prefix, quoted) = rest.split_at(letters);
    let quotes = ["\"\"\"", "'''", "\"", "'"].into_iter().find(|quotes| quoted.starts_with(quotes))?;
    (letters <= 2).then_some(Opening { prefix, quotes: &quoted[..quotes.len()] })
}

/// How long the text is, quotes included; `None` where it does not end.
fn quoted_length(rest: &str, opening: Opening<'_>) -> Option<usize> {
    let is_raw = opening.prefix.contains(['r', 'R']);
    let mut at = opening.prefix.len() + opening.quotes.len();
    loop {
        let tail = rest.get(at..)?;
        if tail.starts_with(opening.quotes) {
            return Some(at + opening.quotes.len());
        }
        let mut chars = tail.chars();
        let first = chars.next()?;
        at += first.len_utf8();
        if first == '\\' && !is_raw {
            at += chars.next()?.len_utf8();
        }
    }
}

fn unclosed(at: usize, opening: Opening<'_>) -> ExpressionError {
    let range = at..at + opening.prefix.len() + opening.quotes.len();
    ExpressionError::new(range, "has a text that does not end").label("no quote closes this one")
}

/// The brackets of a text.
pub(super) struct Brackets {
    /// Those that belong together, each from its opening to behind its closing one.
    pub(super) pairs: Vec<Range<usize>>,
    /// Where those open that nothing closes.
    pub(super) open: Vec<usize>,
}

pub(super) fn brackets(text: &str, lexemes: &[Lexeme]) -> Brackets {
    let (mut open, mut pairs) = (Vec::new(), Vec::new());
    for lexeme in lexemes.iter().filter(|lexeme| lexeme.kind == Kind::Sign) {
        match &text[lexeme.range.clone()] {
            "(" | "[" | "{" => open.push(lexeme.range.start),
            ")" | "]" | "}" => pairs.extend(open.pop().map(|start| start..lexeme.range.end)),
            _ => {}
        }
    }
    Brackets { pairs, open }
}

/// What is SQL and not CEL, if anything is.
pub(super) fn sql(text: &str, lexemes: &[Lexeme]) -> Option<ExpressionError> {
    let word = |place: usize| lexemes.get(place).map_or("", |lexeme| &text[lexeme.range.clone()]);
    let sign_pair = |place: usize, pair: [&str; 2]| {
        let touching = lexemes.get(place + 1).is_some_and(|next| next.range.start == lexemes[place].range.end);
        touching && [word(place), word(place + 1)] == pair
    };
    for (place, lexeme) in lexemes.iter().enumerate() {
        let before = place.checked_sub(1).map_or("", word);
        let found = match lexeme.kind {
            Kind::Text => None,
            Kind::Sign if sign_pair(place, ["<", ">"]) => Some((2, "write `!=`")),
            Kind::Sign if sign_pair(place, [":", ":"]) => {
                Some((2, "write a function: string(…), int(…), double(…), timestamp(…)"))
            }
            Kind::Sign if word(place) == "=" && !"=!<>".contains(before) && word(place + 1) != "=" => {
                Some((1, "write `==`"))
            }
            Kind::Sign => None,
            // A column of that name, or a function.
            Kind::Word if before == "." || word(place + 1) == "(" && !word(place).eq_ignore_ascii_case("in") => None,
            Kind::Word => sql_word(word(place), word(place + 1)).map(|help| (1, help)),
        };
        if let Some((length, help)) = found {
            let range = lexeme.range.start..lexemes[place + length - 1].range.end;
            let problem = format!("is SQL at `{}`, and expressions are CEL", &text[range.clone()]);
            return Some(ExpressionError::new(range, problem).help(help));
        }
    }
    None
}

fn sql_word(word: &str, next: &str) -> Option<&'static str> {
    Some(match word.to_ascii_lowercase().as_str() {
        "and" => "write `&&`",
        "or" => "write `||`",
        "not" if next.eq_ignore_ascii_case("in") => "write `!(row.x in [\"a\", \"b\"])`",
        "not" => "write `!`",
        "is" => "write `row.x == null` or `row.x != null`",
        "like" | "ilike" | "similar" => {
            "write row.x.startsWith(\"…\"), .endsWith(\"…\"), .contains(\"…\") or .matches(\"…\")"
        }
        "between" => "write `row.x >= 1 && row.x <= 9`",
        "in" if next == "(" => "a list stands in square brackets: in [\"a\", \"b\"]",
        "in" if word != "in" => "write `in` in lower case, and the list in square brackets: in [\"a\", \"b\"]",
        "case" | "when" | "then" => "write `condition ? value : other`",
        "interval" => "write duration(\"1h\")",
        "select" | "from" | "where" | "exists" => "an expression sees one row only; a query belongs into [query.NAME]",
        _ => return None,
    })
}
