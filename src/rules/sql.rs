//! SQL with parameters that are named: `select code as dept from departments where id = :department_id`; pure.
//!
//! `:name`, or `:"Name"` with any characters, is a parameter wherever Postgres would read a token: not inside of literals
//! (`'…'`, `E'…'`, `$$…$$`), quoted names and comments, and not where `::` is a cast. Everything else is Postgres's to
//! judge. Its words are followed only as far as needed to find these places (the manual's "Lexical Structure").

use std::ops::Range;

/// A statement and its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sql {
    text: String,
    uses: Vec<Parameter>,
}

/// A parameter where it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Its name.
    pub name: String,
    /// Its bytes in the text, the colon included.
    pub range: Range<usize>,
}

/// A text that is no statement with named parameters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct SqlError {
    /// The bytes of the text that are wrong.
    pub range: Range<usize>,
    /// What is wrong, behind the name of the field.
    pub problem: &'static str,
    /// What to do.
    pub help: &'static str,
}

impl Sql {
    /// Finds the parameters.
    ///
    /// # Errors
    /// Where a literal, a name or a comment does not end, where a second statement would begin, and for `$1`.
    pub fn parse(text: &str) -> Result<Self, SqlError> {
        let mut uses = Vec::new();
        let mut at = 0;
        while let Some(next) = text[at..].chars().next() {
            let rest = &text[at..];
            at = match next {
                '\'' => quoted(text, at, '\'', is_escape_string(&text[..at]))?,
                '"' => quoted(text, at, '"', false)?,
                '$' => dollar(text, at)?,
                '-' if rest.starts_with("--") => at + rest.find('\n').unwrap_or(rest.len()),
                '/' if rest.starts_with("/*") => comment(text, at)?,
                ':' if rest.starts_with("::") => at + 2,
                ':' => match parameter(text, at)? {
                    Some(parameter) => {
                        let end = parameter.range.end;
                        uses.push(parameter);
                        end
                    }
                    None => at + 1,
                },
                ';' => {
                    let help = "leave the `;` out; only one statement is run";
                    return Err(SqlError { range: at..at + 1, problem: "holds a `;`", help });
                }
                other => at + other.len_utf8(),
            };
        }
        if text.trim().is_empty() {
            let help = "write a query:  \"select code as dept from public.departments where id = :department_id\"";
            return Err(SqlError { range: 0..text.len(), problem: "is empty", help });
        }
        Ok(Sql { text: text.to_owned(), uses })
    }

    /// As written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Every place where a parameter stands, in order.
    pub fn uses(&self) -> &[Parameter] {
        &self.uses
    }

    /// The names of its parameters, each once: the first is `$1`.
    pub fn parameters(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for parameter in &self.uses {
            if !names.contains(&parameter.name.as_str()) {
                names.push(&parameter.name);
            }
        }
        names
    }

    /// As Postgres wants it. A `$1` is as long as the name that it stands for, so that Postgres's positions are those of
    /// the text.
    pub fn statement(&self) -> String {
        let names = self.parameters();
        let mut statement = String::with_capacity(self.text.len());
        let mut at = 0;
        for Parameter { name, range } in &self.uses {
            let number = names.iter().position(|known| known == name).map_or(0, |place| place + 1);
            let width = self.text[range.clone()].chars().count();
            statement.push_str(&self.text[at..range.start]);
            statement.push_str(&format!("{:<width$}", format!("${number}")));
            at = range.end;
        }
        statement.push_str(&self.text[at..]);
        statement
    }

    /// The bytes of the text at a position that Postgres gives: it counts characters from 1.
    pub fn at_position(&self, position: u32) -> Range<usize> {
        let skipped = usize::try_from(position).unwrap_or(usize::MAX).saturating_sub(1);
        let start = self.text.char_indices().nth(skipped).map_or(self.text.len(), |(start, _)| start);
        if let Some(parameter) = self.uses.iter().find(|parameter| parameter.range.contains(&start)) {
            return parameter.range.clone();
        }
        let word = self.text[start..].find(|c| !is_in_name(c)).unwrap_or(self.text.len() - start);
        let first = self.text[start..].chars().next().map_or(0, char::len_utf8);
        start..start + word.max(first)
    }
}

fn starts_name(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn is_in_name(c: char) -> bool {
    starts_name(c) || c.is_ascii_digit() || c == '$'
}

/// Whether what stands before a quote makes backslashes in it count.
fn is_escape_string(before: &str) -> bool {
    let mut backwards = before.chars().rev();
    matches!(backwards.next(), Some('e' | 'E')) && !backwards.next().is_some_and(is_in_name)
}

/// The end of what is quoted from `start` on; a doubled quote stands for itself.
fn quoted(text: &str, start: usize, quote: char, escapes: bool) -> Result<usize, SqlError> {
    let mut inside = text[start + 1..].char_indices().peekable();
    while let Some((at, c)) = inside.next() {
        if c == '\\' && escapes {
            inside.next();
        } else if c == quote && inside.next_if(|(_, next)| *next == quote).is_none() {
            return Ok(start + 1 + at + 1);
        }
    }
    Err(SqlError { range: start..start + 1, problem: "has a quote that is not closed", help: "close it" })
}

/// The end of a `$tag$…$tag$`, or of a `$` that is none.
fn dollar(text: &str, start: usize) -> Result<usize, SqlError> {
    let rest = &text[start + 1..];
    if text[..start].chars().next_back().is_some_and(is_in_name) {
        return Ok(start + 1);
    }
    if rest.starts_with(|c: char| c.is_ascii_digit()) {
        let end = start + 1 + rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let help = "parameters have names: write `:` and the column's name";
        return Err(SqlError { range: start..end, problem: "has a parameter without a name", help });
    }
    let length = rest.find(|c| c == '$' || !is_in_name(c)).unwrap_or(rest.len());
    if !rest[length..].starts_with('$') {
        return Ok(start + 1);
    }
    let tag = &text[start..start + length + 2];
    let body = start + tag.len();
    match text[body..].find(tag) {
        Some(found) => Ok(body + found + tag.len()),
        None => Err(SqlError { range: start..body, problem: "has a quote that is not closed", help: "close it" }),
    }
}

/// The end of a comment, which may hold others.
fn comment(text: &str, start: usize) -> Result<usize, SqlError> {
    let (mut depth, mut at) = (0_u32, start);
    while let Some(found) = text[at..].find("/*").into_iter().chain(text[at..].find("*/")).min() {
        let opens = text[at + found..].starts_with("/*");
        depth = if opens { depth + 1 } else { depth - 1 };
        at += found + 2;
        if depth == 0 {
            return Ok(at);
        }
    }
    Err(SqlError { range: start..start + 2, problem: "has a comment that is not closed", help: "close it with `*/`" })
}

/// The parameter whose colon stands at `start`, if it is one.
fn parameter(text: &str, start: usize) -> Result<Option<Parameter>, SqlError> {
    let name = start + 1;
    let rest = &text[name..];
    if rest.starts_with('"') {
        let end = quoted(text, name, '"', false)?;
        return Ok(Some(Parameter { name: text[name + 1..end - 1].replace("\"\"", "\""), range: start..end }));
    }
    let length = rest.find(|c| !is_in_name(c)).unwrap_or(rest.len());
    Ok(rest
        .starts_with(starts_name)
        .then(|| Parameter { name: rest[..length].to_owned(), range: start..name + length }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, parameters: &[&str], statement: &str) {
        let sql = Sql::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        assert_eq!((sql.parameters(), sql.statement()), (parameters.to_vec(), statement.to_owned()), "{text}");
    }

    #[test]
    fn parameters_are_found_where_a_token_can_stand() {
        check("select 1", &[], "select 1");
        check("select a from t where id = :id", &["id"], "select a from t where id = $1 ");
        check("values (:a, :bc,:a)", &["a", "bc"], "values ($1, $2 ,$1)");
        check("select :größe::text", &["größe"], "select $1    ::text");
        check("select :\"a \"\"b\" + 1", &["a \"b"], "select $1       + 1");
        check("select x[1:2], f(a := 1), now()::date", &[], "select x[1:2], f(a := 1), now()::date");
        check("select a$b, $x, x$1", &[], "select a$b, $x, x$1");
    }

    #[test]
    fn literals_names_and_comments_have_none() {
        for text in [
            "select ':a', 'it''s :b'",
            r"select 'c:\' || 'd :e'",
            r"select E'\':f', e'\\', ':g'",
            "select \":h\", \"a\"\":i\"",
            "select $$ :j ' $$, $tag$ :k $$ $tag$",
            "select 1 -- :l ' ; \n + 2",
            "select 1 /* :m /* ; ' */ :n */ + 2",
            "select 1 -- to the end",
        ] {
            check(text, &[], text);
        }
        check(r"select name'\', :a", &["a"], r"select name'\', $1");
        check("select 'ü' /* é */, :a", &["a"], "select 'ü' /* é */, $1");
    }

    #[test]
    fn mistakes_are_named_at_their_place() {
        for (text, wrong, problem) in [
            ("select 'a", "'", "has a quote that is not closed"),
            ("select \"a''", "\"", "has a quote that is not closed"),
            ("select $a$ $b$", "$a$", "has a quote that is not closed"),
            ("select /* /* */", "/*", "has a comment that is not closed"),
            ("select 1;", ";", "holds a `;`"),
            ("select $12 + 1", "$12", "has a parameter without a name"),
            (" ", " ", "is empty"),
        ] {
            let error = Sql::parse(text).expect_err(text);
            assert_eq!((&text[error.range], error.problem), (wrong, problem), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_statement_or_a_mistake_within_it(text in r#"[-/:;'"$*aeE1é\n ]{0,40}"#) {
            match Sql::parse(&text) {
                Ok(sql) => {
                    let named = sql.uses().iter().all(|parameter| text[parameter.range.clone()].starts_with(':'));
                    proptest::prop_assert!(named && sql.statement().chars().count() >= text.chars().count());
                    (0..50).for_each(|position| _ = &text[sql.at_position(position)]);
                }
                Err(error) => proptest::prop_assert!(text.get(error.range).is_some()),
            }
        }
    }

    #[test]
    fn positions_are_those_of_the_text() {
        let sql = Sql::parse("select 'ü', nam from t where id = :idx").expect("a statement");
        assert_eq!(&sql.text()[sql.at_position(13)], "nam");
        assert_eq!(&sql.text()[sql.at_position(35)], ":idx");
        assert_eq!(&sql.text()[sql.at_position(11)], ",");
        assert!(sql.at_position(500).is_empty());
    }
}
