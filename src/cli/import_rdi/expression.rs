//! The expressions of jobs, in JMESPath or SQL, as far as key templates and conditions can say the same.
//!
//! Both languages are read into one [`Expression`]. Whatever is not among its variants is an error that names it: an
//! expression is translated whole or not at all.

use super::super::rules_text::{literal, placeholder};

/// How deep parentheses and calls may lie in each other.
const DEPTH_MAX: usize = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Language {
    JmesPath,
    Sql,
}

impl Language {
    pub(super) fn from_name(name: &str) -> Option<Self> {
        match name {
            "jmespath" => Some(Self::JmesPath),
            "sql" => Some(Self::Sql),
            _ => None,
        }
    }
}

/// What both languages can say and keepstep too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Expression {
    Field(String),
    /// A field of the row as it was; no rule can say it.
    Before(String),
    Text(String),
    Number(String),
    Flag(bool),
    Null,
    Concat(Vec<Expression>),
    Case(Case, Box<Expression>),
    /// With CEL's operator.
    Compare(&'static str, Box<Expression>, Box<Expression>),
    In(Box<Expression>, Vec<Expression>),
    All(Vec<Expression>),
    Any(Vec<Expression>),
    Not(Box<Expression>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    Lower,
    Upper,
}

impl Expression {
    /// Reads an expression; the error says what of it is not translated.
    ///
    /// With `row_format: full` fields stand behind `after.`, `before.` and `key.`.
    pub(super) fn parse(text: &str, language: Language, full_rows: bool) -> Result<Self, String> {
        let mut parser = Parser { tokens: tokens(text, language)?, at: 0, language, full_rows, depth: 0 };
        let expression = parser.any()?;
        match parser.peek() {
            None => Ok(expression),
            Some(token) => Err(format!("{} is not translated", token.shown())),
        }
    }

    /// With fields replaced by what they stand for.
    pub(super) fn resolved(self, field: &impl Fn(String) -> Result<Expression, String>) -> Result<Self, String> {
        let one = |inner: Box<Expression>| inner.resolved(field).map(Box::new);
        let all = |inner: Vec<Expression>| {
            inner.into_iter().map(|inner| inner.resolved(field)).collect::<Result<Vec<_>, _>>()
        };
        Ok(match self {
            Self::Field(name) => field(name)?,
            Self::Before(name) => return Err(format!("`before.{name}`: a rule looks at one row at a time")),
            Self::Concat(parts) => Self::Concat(all(parts)?),
            Self::Case(case, inner) => Self::Case(case, one(inner)?),
            Self::Compare(operator, left, right) => Self::Compare(operator, one(left)?, one(right)?),
            Self::In(value, list) => Self::In(one(value)?, all(list)?),
            Self::All(parts) => Self::All(all(parts)?),
            Self::Any(parts) => Self::Any(all(parts)?),
            Self::Not(inner) => Self::Not(one(inner)?),
            constant @ (Self::Text(_) | Self::Number(_) | Self::Flag(_) | Self::Null) => constant,
        })
    }

    /// The same as a key template, if one can say it.
    pub(super) fn template(&self) -> Option<String> {
        match self {
            Self::Field(name) => placeholder(name),
            Self::Text(text) => Some(literal(text)),
            Self::Number(number) => Some(number.clone()),
            Self::Concat(parts) => parts.iter().map(Self::template).collect(),
            Self::Case(case, inner) => {
                let inner = matches!(**inner, Self::Field(_) | Self::Case(..)).then(|| inner.template()).flatten()?;
                let filter = match case {
                    Case::Lower => "lower",
                    Case::Upper => "upper",
                };
                Some(format!("{}|{filter}}}", inner.strip_suffix('}')?))
            }
            _ => None,
        }
    }

    /// The same in CEL's syntax.
    pub(super) fn cel(&self) -> String {
        let joined = |parts: &[Expression], one: fn(&Expression) -> String, between: &str| {
            parts.iter().map(one).collect::<Vec<_>>().join(between)
        };
        match self {
            Self::Field(name) if is_plain(name) => format!("row.{name}"),
            Self::Field(name) => format!("row[{}]", cel_text(name)),
            Self::Before(name) => format!("before.{name}"),
            Self::Text(text) => cel_text(text),
            Self::Number(number) => number.clone(),
            Self::Flag(flag) => flag.to_string(),
            Self::Null => "null".to_owned(),
            Self::Concat(parts) => {
                let text = |part: &Expression| match part {
                    Self::Text(_) | Self::Case(..) => part.cel_operand(),
                    _ => format!("string({})", part.cel()),
                };
                parts.iter().map(text).collect::<Vec<_>>().join(" + ")
            }
            Self::Case(Case::Lower, inner) => format!("{}.lowerAscii()", inner.cel_operand()),
            Self::Case(Case::Upper, inner) => format!("{}.upperAscii()", inner.cel_operand()),
            Self::Compare(operator, left, right) => {
                format!("{} {operator} {}", left.cel_operand(), right.cel_operand())
            }
            Self::In(value, values) => format!("{} in [{}]", value.cel_operand(), joined(values, Self::cel, ", ")),
            Self::All(parts) => joined(parts, Self::cel_term, " && "),
            Self::Any(parts) => joined(parts, Self::cel_term, " || "),
            Self::Not(inner) => format!("!{}", inner.cel_operand()),
        }
    }

    /// Conditions that must all hold, in CEL's syntax; a single one as it is.
    pub(super) fn all_of(conditions: &[Expression]) -> Option<String> {
        match conditions {
            [] => None,
            [only] => Some(only.cel()),
            several => Some(several.iter().map(Self::cel_term).collect::<Vec<_>>().join(" && ")),
        }
    }

    /// The same between `&&` and `||`, which bind less than anything else.
    fn cel_term(&self) -> String {
        if matches!(self, Self::Any(_) | Self::All(_)) { format!("({})", self.cel()) } else { self.cel() }
    }

    /// The same where another operator stands beside it.
    fn cel_operand(&self) -> String {
        match self {
            Self::Compare(..) | Self::In(..) | Self::All(_) | Self::Any(_) | Self::Concat(_) => {
                format!("({})", self.cel())
            }
            _ => self.cel(),
        }
    }
}

fn is_plain(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(plain)
}

/// A string of CEL, whose escapes are those of JSON.
fn cel_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    /// A name in quotes, never a key word.
    Quoted(String),
    Constant(Expression),
    Symbol(&'static str),
}

impl Token {
    fn shown(&self) -> String {
        match self {
            Token::Name(name) | Token::Quoted(name) => format!("`{name}`"),
            Token::Constant(Expression::Text(text)) => format!("`'{text}'`"),
            Token::Constant(constant) => format!("`{}`", constant.cel()),
            Token::Symbol(symbol) => format!("`{symbol}`"),
        }
    }
}

/// The longer ones first.
const SYMBOLS: [&str; 22] = [
    "||", "&&", "==", "!=", "<>", "<=", ">=", "=", "<", ">", "!", "(", ")", "[", "]", ",", ".", "|", "{", "}", ":", "*",
];

fn tokens(text: &str, language: Language) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, length) = match first {
            '\'' => in_quotes(rest, first, language)
                .map(|(text, length)| (Token::Constant(Expression::Text(text)), length))?,
            '"' => in_quotes(rest, first, language).map(|(text, length)| (Token::Quoted(text), length))?,
            '`' => {
                in_quotes(rest, first, language).map(|(text, length)| (Token::Constant(json_literal(&text)), length))?
            }
            first if first.is_ascii_digit() => {
                let length = rest.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(rest.len());
                (Token::Constant(Expression::Number(rest[..length].to_owned())), length)
            }
            first if first.is_alphabetic() || first == '_' => {
                let length = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
                (Token::Name(rest[..length].to_owned()), length)
            }
            first => {
                let symbol = SYMBOLS.into_iter().find(|symbol| rest.starts_with(symbol));
                let symbol = symbol.ok_or_else(|| format!("`{first}` is not translated"))?;
                (Token::Symbol(symbol), symbol.len())
            }
        };
        tokens.push(token);
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

/// What stands between the quote that `text` begins with and the next one, and how long all of it is. In SQL a quote is
/// doubled, in JMESPath it stands behind a backslash.
fn in_quotes(text: &str, quote: char, language: Language) -> Result<(String, usize), String> {
    let mut inner = String::new();
    let mut rest = text[quote.len_utf8()..].char_indices().peekable();
    while let Some((at, c)) = rest.next() {
        let next = rest.peek().map(|(_, next)| *next);
        let escaped = match language {
            Language::Sql => c == quote && next == Some(quote),
            Language::JmesPath => c == '\\' && next == Some(quote),
        };
        if escaped {
            rest.next();
            inner.push(quote);
        } else if c == quote {
            return Ok((inner, at + 2 * quote.len_utf8()));
        } else {
            inner.push(c);
        }
    }
    Err(format!("a `{quote}` is not closed"))
}

/// What stands between backticks: JSON, or a text without its quotes.
fn json_literal(text: &str) -> Expression {
    match serde_json::from_str(text) {
        Ok(serde_json::Value::Null) => Expression::Null,
        Ok(serde_json::Value::Bool(flag)) => Expression::Flag(flag),
        Ok(serde_json::Value::Number(number)) => Expression::Number(number.to_string()),
        Ok(serde_json::Value::String(text)) => Expression::Text(text),
        _ => Expression::Text(text.to_owned()),
    }
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    language: Language,
    full_rows: bool,
    depth: usize,
}

type Parsed = Result<Expression, String>;

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn take_symbol(&mut self, symbol: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Symbol(next)) if *next == symbol);
        self.at += usize::from(found);
        found
    }

    /// A key word of SQL.
    fn take_word(&mut self, word: &str) -> bool {
        let is_word = |token: &Token| matches!(token, Token::Name(name) if name.eq_ignore_ascii_case(word));
        let found = self.language == Language::Sql && self.peek().is_some_and(is_word);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, symbol: &str) -> Result<(), String> {
        if self.take_symbol(symbol) { Ok(()) } else { Err(self.unexpected(symbol)) }
    }

    fn unexpected(&self, wanted: &str) -> String {
        match self.peek() {
            Some(token) => format!("{} stands where `{wanted}` was expected", token.shown()),
            None => format!("it ends where `{wanted}` was expected"),
        }
    }

    fn any(&mut self) -> Parsed {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err("it is too deep".to_owned());
        }
        let mut parts = vec![self.all()?];
        while self.take_word("or") || self.language == Language::JmesPath && self.take_symbol("||") {
            parts.push(self.all()?);
        }
        self.depth -= 1;
        // `after.id || before.id` is the field of whichever row there is.
        let fields = parts.clone();
        let of_either = |name: &String| fields.contains(&Expression::Field(name.clone()));
        parts.retain(|part| !matches!(part, Expression::Before(name) if of_either(name)));
        Ok(one_or(parts, Expression::Any))
    }

    fn all(&mut self) -> Parsed {
        let mut parts = vec![self.not()?];
        while self.take_word("and") || self.language == Language::JmesPath && self.take_symbol("&&") {
            parts.push(self.not()?);
        }
        Ok(one_or(parts, Expression::All))
    }

    fn not(&mut self) -> Parsed {
        let mut negated = false;
        while self.take_word("not") || self.take_symbol("!") {
            negated = !negated;
        }
        let inner = self.comparison()?;
        Ok(if negated { Expression::Not(Box::new(inner)) } else { inner })
    }

    fn comparison(&mut self) -> Parsed {
        let left = self.concat()?;
        if self.take_word("is") {
            let operator = if self.take_word("not") { "!=" } else { "==" };
            return match self.take_word("null") {
                true => Ok(Expression::Compare(operator, Box::new(left), Box::new(Expression::Null))),
                false => Err(self.unexpected("null")),
            };
        }
        let negated = self.take_word("not");
        if self.take_word("in") {
            self.expect("(")?;
            let list = Expression::In(Box::new(left), self.list(")")?);
            return Ok(if negated { Expression::Not(Box::new(list)) } else { list });
        }
        let operators =
            [("==", "=="), ("=", "=="), ("!=", "!="), ("<>", "!="), ("<=", "<="), (">=", ">="), ("<", "<"), (">", ">")];
        for (symbol, operator) in operators {
            if self.take_symbol(symbol) {
                return Ok(Expression::Compare(operator, Box::new(left), Box::new(self.concat()?)));
            }
        }
        if negated { Err(self.unexpected("in")) } else { Ok(left) }
    }

    fn concat(&mut self) -> Parsed {
        let mut parts = vec![self.primary()?];
        while self.language == Language::Sql && self.take_symbol("||") {
            parts.push(self.primary()?);
        }
        Ok(one_or(parts, Expression::Concat))
    }

    fn primary(&mut self) -> Parsed {
        if self.take_symbol("(") {
            let inner = self.any()?;
            self.expect(")")?;
            return Ok(inner);
        }
        let Some(token) = self.peek().cloned() else { return Err(self.unexpected("a value")) };
        self.at += 1;
        match token {
            Token::Constant(constant) => Ok(constant),
            Token::Name(name) if self.take_symbol("(") => self.call(&name),
            Token::Name(name) if self.language == Language::Sql && name.eq_ignore_ascii_case("true") => {
                Ok(Expression::Flag(true))
            }
            Token::Name(name) if self.language == Language::Sql && name.eq_ignore_ascii_case("false") => {
                Ok(Expression::Flag(false))
            }
            Token::Name(name) if name.eq_ignore_ascii_case("null") => Ok(Expression::Null),
            Token::Name(name) | Token::Quoted(name) => self.field(name),
            symbol @ Token::Symbol(_) => Err(format!("{} is not translated", symbol.shown())),
        }
    }

    /// A field, whose first name was read.
    fn field(&mut self, first: String) -> Parsed {
        if !self.take_symbol(".") {
            return match self.full_rows {
                true => {
                    Err(format!("`{first}` is nothing of the row; only `after`, `before` and `key` are translated"))
                }
                false => Ok(Expression::Field(first)),
            };
        }
        let name = match self.peek().cloned() {
            Some(Token::Name(name) | Token::Quoted(name)) => name,
            _ => return Err(self.unexpected("a field's name")),
        };
        self.at += 1;
        let of_row = self.full_rows && matches!(first.as_str(), "after" | "before" | "key");
        if !of_row || self.take_symbol(".") {
            return Err(format!("`{first}.{name}` lies inside of a field"));
        }
        Ok(if first == "before" { Expression::Before(name) } else { Expression::Field(name) })
    }

    /// A call, whose name and parenthesis were read.
    fn call(&mut self, name: &str) -> Parsed {
        let function = name.to_ascii_lowercase();
        if function == "concat" && self.language == Language::JmesPath {
            self.expect("[")?;
            let parts = self.list("]")?;
            self.expect(")")?;
            return Ok(Expression::Concat(parts));
        }
        if function == "contains" && self.language == Language::JmesPath && self.take_symbol("[") {
            let list = self.list("]")?;
            self.expect(",")?;
            let value = self.any()?;
            self.expect(")")?;
            return Ok(Expression::In(Box::new(value), list));
        }
        let mut arguments = self.list(")")?;
        let single = if arguments.len() == 1 { arguments.pop() } else { None };
        match (function.as_str(), single) {
            ("concat", None) => Ok(Expression::Concat(arguments)),
            ("lower", Some(argument)) => Ok(Expression::Case(Case::Lower, Box::new(argument))),
            ("upper", Some(argument)) => Ok(Expression::Case(Case::Upper, Box::new(argument))),
            ("to_string" | "concat", Some(argument)) => Ok(argument),
            _ => Err(format!("the function `{name}` is not translated")),
        }
    }

    /// What stands before `end`, which is read too.
    fn list(&mut self, end: &str) -> Result<Vec<Expression>, String> {
        let mut parts = Vec::new();
        if self.take_symbol(end) {
            return Ok(parts);
        }
        loop {
            parts.push(self.any()?);
            if self.take_symbol(end) {
                return Ok(parts);
            }
            self.expect(",")?;
        }
    }
}

/// A single part is itself.
fn one_or(mut parts: Vec<Expression>, several: fn(Vec<Expression>) -> Expression) -> Expression {
    match (parts.pop(), parts.is_empty()) {
        (Some(only), true) => only,
        (last, _) => {
            parts.extend(last);
            several(parts)
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_become_templates() {
        let jmespath = [
            ("concat(['invoice_id:', InvoiceId])", "invoice_id:{InvoiceId}"),
            ("concat(['a', '#', lower(\"b c\"), `1`])", "a#{b c|lower}1"),
            ("`invoice:events`", "invoice:events"),
            ("'{x}'", "{{x}}"),
            ("upper(lower(to_string(id)))", "{id|lower|upper}"),
            ("id", "{id}"),
        ];
        for (text, template) in jmespath {
            let expression = Expression::parse(text, Language::JmesPath, false).unwrap();
            assert_eq!(expression.template().as_deref(), Some(template), "{text}");
        }
        let sql =
            [("'a:' || id || ':' || UPPER(\"Name\")", "a:{id}:{Name|upper}"), ("CONCAT('it''s ', id)", "it's {id}")];
        for (text, template) in sql {
            let expression = Expression::parse(text, Language::Sql, false).unwrap();
            assert_eq!(expression.template().as_deref(), Some(template), "{text}");
        }
        let full =
            Expression::parse("concat(['a:', after.ID || before.ID, key.\"x y\"])", Language::JmesPath, true).unwrap();
        assert_eq!(full.template().as_deref(), Some("a:{ID}{x y}"));
    }

    #[test]
    fn conditions_become_cel() {
        let sql = [
            ("age>20", "row.age > 20"),
            (
                "country = 'UK' AND NOT (a <> 1 OR b IS NOT NULL)",
                "row.country == \"UK\" && !(row.a != 1 || row.b != null)",
            ),
            ("status not in ('a', 'b')", "!(row.status in [\"a\", \"b\"])"),
            ("lower(\"E Mail\") = 'x' or active = TRUE", "row[\"E Mail\"].lowerAscii() == \"x\" || row.active == true"),
            ("first || ' ' || last", "string(row.first) + \" \" + string(row.last)"),
        ];
        for (text, cel) in sql {
            assert_eq!(Expression::parse(text, Language::Sql, false).unwrap().cel(), cel, "{text}");
        }
        let jmespath = [
            ("age > `20` && !deleted", "row.age > 20 && !row.deleted"),
            ("contains(['a', 'b'], status) || x == null", "row.status in [\"a\", \"b\"] || row.x == null"),
        ];
        for (text, cel) in jmespath {
            assert_eq!(Expression::parse(text, Language::JmesPath, false).unwrap().cel(), cel, "{text}");
        }
    }

    #[test]
    fn what_is_not_translated_is_named() {
        let said = |text: &str, language, full| Expression::parse(text, language, full).unwrap_err();
        let jmespath = |text: &str| said(text, Language::JmesPath, false);
        assert_eq!(jmespath("values(key)[0]"), "the function `values` is not translated");
        assert_eq!(jmespath("a | b"), "`|` is not translated");
        assert_eq!(jmespath("name.first"), "`name.first` lies inside of a field");
        assert_eq!(jmespath("concat(['a'"), "it ends where `,` was expected");
        assert_eq!(jmespath("'a"), "a `'` is not closed");
        assert_eq!(jmespath(""), "it ends where `a value` was expected");
        assert!(said("opcode == 'd'", Language::JmesPath, true).starts_with("`opcode` is nothing of the row"));
        assert_eq!(said("CASE WHEN a THEN b END", Language::Sql, false), "`WHEN` is not translated");
        assert_eq!(said("a / 2", Language::Sql, false), "`/` is not translated");
        assert_eq!(said(&"(".repeat(100), Language::Sql, false), "it is too deep");
        assert_eq!(Expression::parse("a == b", Language::JmesPath, false).unwrap().template(), None);
    }

    proptest! {
        #[test]
        fn any_text_is_translated_or_refused(text in "(concat|\\[|\\]|\\(|\\)|\\|\\||'|`|\"|a|,| |=|not |é|\\PC){0,20}") {
            for language in [Language::JmesPath, Language::Sql] {
                if let Ok(expression) = Expression::parse(&text, language, false) {
                    let _ = (expression.template(), expression.cel());
                }
            }
        }
    }
}
