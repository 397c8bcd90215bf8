//! `${NAME}`, `${NAME:-default}` and `${file:/path}` in the values of `[postgres]`, `[redis]` and `[admin]`.
//!
//! As in a shell, the default stands in for a variable that is unset or empty. A file's last line break is left out.
//! `$${` is a literal `${`, and a `$` before anything else stands for itself. What was filled in is never repeated
//! in a message.

use std::borrow::Cow;
use std::io::{self, Read};
use std::ops::Range;

use super::Environment;
use super::code::Code;
use super::mistake::Mistake;

/// How large a `${file:…}` may be: secrets are short, and a wrong path must not fill the memory.
const SECRET_FILE_BYTES_MAX: u64 = 64 * 1024;

/// The text with everything filled in, or every mistake in it.
pub(super) fn fill<'t>(text: &'t str, env: &Environment<'_>) -> Result<Cow<'t, str>, Vec<Mistake>> {
    if !text.contains("${") {
        return Ok(Cow::Borrowed(text));
    }
    let mut filled = String::with_capacity(text.len());
    let mut mistakes = Vec::new();
    let mut at = 0;
    while let Some(found) = text[at..].find("${") {
        let start = at + found;
        if text[at..start].ends_with('$') {
            filled.push_str(&text[at..start]);
            filled.push('{');
            at = start + 2;
            continue;
        }
        filled.push_str(&text[at..start]);
        let Some(length) = text[start..].find('}') else {
            let open = mistake(Code::Reference, start..text.len(), "has a `${` without its `}`");
            mistakes.push(open.help("for a literal `${` write `$${`"));
            return Err(mistakes);
        };
        at = start + length + 1;
        match look_up(&text[start + 2..at - 1], start..at, env) {
            Ok(value) => filled.push_str(&value),
            Err(mistake) => mistakes.push(mistake),
        }
    }
    filled.push_str(&text[at..]);
    if mistakes.is_empty() { Ok(Cow::Owned(filled)) } else { Err(mistakes) }
}

/// The value of what stands between `${` and `}`; `range` is where.
fn look_up(body: &str, range: Range<usize>, env: &Environment<'_>) -> Result<String, Mistake> {
    if let Some(path) = body.strip_prefix("file:") {
        return read_secret(path).map_err(|error| {
            mistake(Code::UnreadableSecret, range, format!("names a file that cannot be read: {error}"))
                .help("the path is taken as it is; a relative one begins where keepstep was started")
        });
    }
    let (name, default) = match body.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (body, None),
    };
    if !is_variable(name) {
        let help = "write ${NAME}, ${NAME:-default} or ${file:/path}; for a literal `${` write `$${`";
        return Err(mistake(Code::Reference, range, "names no variable").help(help));
    }
    if default.is_some_and(|default| default.contains("${")) {
        return Err(mistake(Code::Reference, range, "has a `${…}` inside another one").help("a default is plain text"));
    }
    match (env(name), default) {
        (Some(value), None) => Ok(value),
        (Some(value), Some(_)) if !value.is_empty() => Ok(value),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(mistake(
            Code::UnsetVariable,
            range,
            format!("needs the environment variable `{name}`, which is not set"),
        )
        .label("not set")
        .help(format!("set it, give a default ${{{name}:-…}}, or read a file ${{file:/run/secrets/…}}"))),
    }
}

fn mistake(code: Code, range: Range<usize>, problem: impl Into<String>) -> Mistake {
    Mistake { range, ..Mistake::whole(code, "", problem) }
}

/// Whether a shell would take `name` for a variable's.
fn is_variable(name: &str) -> bool {
    let ordinary = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    !name.is_empty() && name.bytes().all(ordinary) && !name.starts_with(|c: char| c.is_ascii_digit())
}

/// The content of a file without its last line break.
fn read_secret(path: &str) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.take(SECRET_FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > SECRET_FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {SECRET_FILE_BYTES_MAX} bytes")));
    }
    let line = text.strip_suffix('\n').unwrap_or(&text);
    Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
}

/// A `${…}` where none is filled in.
pub(super) fn reference_out_of_place(text: &str) -> Option<Mistake> {
    let start = text.find("${")?;
    let end = start + text[start..].find('}')? + 1;
    let body = &text[start + 2..end - 1];
    let name = body.split(":-").next().unwrap_or_default();
    let environment = is_variable(name) && !name.contains(|c: char| c.is_ascii_lowercase());
    if !environment && !body.starts_with("file:") && !body.contains(":-") {
        let help = format!("a template names a column without the `$`: {{{body}}}");
        let mistake = Mistake::whole(Code::MisplacedReference, text, "has a `$` in front of a placeholder").help(help);
        return Some(Mistake { range: start..end, ..mistake });
    }
    let mistake = Mistake::whole(Code::MisplacedReference, text, "has a `${…}`, which nothing fills in here")
        .label("taken literally");
    let help = "only [postgres], [redis] and [admin] take values from the environment; what differs between \
                deployments of one rules file belongs in `prefix` of [redis]";
    Some(Mistake { range: start..end, ..mistake.help(help) })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    fn env(name: &str) -> Option<String> {
        match name {
            "HOST" => Some("db".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        }
    }

    #[test]
    fn references_are_filled_in() {
        let cases = [
            ("", ""),
            ("pg://${HOST}/${NAME:-shop}", "pg://db/shop"),
            ("${HOST:-other}${EMPTY:-x}${EMPTY}${NONE:-}", "dbx"),
            ("$${HOST} $HOST $ $$ a}", "${HOST} $HOST $ $$ a}"),
        ];
        for (text, filled) in cases {
            assert_eq!(fill(text, &env).unwrap(), filled, "{text}");
        }
    }

    #[test]
    fn a_secrets_file_loses_its_last_line_break_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        for (content, secret) in [("a\n", "a"), ("a\r\n", "a"), (" a\n\n", " a\n"), ("", "")] {
            std::fs::write(&path, content).unwrap();
            assert_eq!(fill(&format!("<${{file:{}}}>", path.display()), &env).unwrap(), format!("<{secret}>"));
        }
        std::fs::write(&path, vec![b'a'; SECRET_FILE_BYTES_MAX as usize + 1]).unwrap();
        let mistakes = fill(&format!("${{file:{}}}", path.display()), &env).unwrap_err();
        assert!(mistakes[0].problem.ends_with("it is larger than 65536 bytes"), "{mistakes:?}");
    }

    #[test]
    fn every_mistake_has_its_place() {
        let text = "${NONE} ${} ${1x} ${file:/nowhere} ${A:-${B}} ${HOST} ${";
        let mistakes = fill(text, &env).unwrap_err();
        let shown: Vec<_> = mistakes.iter().map(|m| format!("{:?} {}", &text[m.range.clone()], m.problem)).collect();
        insta::assert_snapshot!(shown.join("\n"));
    }

    proptest! {
        #[test]
        fn any_text_is_filled_in_or_refused_at_a_place_in_it(text in "(\\$|\\{|\\}|:-|HOST|NONE|\\PC){0,20}") {
            for mistake in fill(&text, &env).err().unwrap_or_default() {
                prop_assert!(text.get(mistake.range).is_some());
            }
        }
    }
}
