//! Hides secrets in the text of a rules file before any of it is shown.
//!
//! It works on the bytes and not on parsed TOML, because a file with a mistake in its quotes is shown too. It hides
//! too much rather than too little. Every hidden byte becomes one `*`, so spans stay right; `${…}` without a default
//! is no secret and stays.

/// A name that holds one of these is taken to name a secret.
const SECRET_NAMES: [&str; 3] = ["pass", "secret", "token"];

/// The text with the passwords of URLs, and the values of everything named as a secret, hidden.
pub(super) fn mask(text: &str) -> String {
    let mut out = text.as_bytes().to_vec();
    for (at, _) in text.match_indices("://") {
        hide_password(&mut out, at + "://".len());
    }
    for (at, _) in text.match_indices('=') {
        if names_secret(&text[..at]) {
            hide_value(&mut out, at + 1);
        }
    }
    // Only bytes of whole characters were replaced, and by ASCII.
    String::from_utf8_lossy(&out).into_owned()
}

/// Hides what stands between the first `:` and the last `@` of a URL whose authority begins at `start`. Passwords
/// may hold `/`, `?` and `#` where somebody forgot to encode them, so only the end of the string ends the URL.
fn hide_password(text: &mut [u8], start: usize) {
    let length = text[start..].iter().position(|byte| b"\"'\n\r".contains(byte)).unwrap_or(text.len() - start);
    let url = &mut text[start..start + length];
    let Some(at) = url.iter().rposition(|byte| *byte == b'@') else { return };
    if let Some(colon) = url[..at].iter().position(|byte| *byte == b':') {
        hide(&mut url[colon + 1..at]);
    }
}

/// Whether the last name in `before`, which stands before an `=`, is one of a secret.
fn names_secret(before: &str) -> bool {
    let before = before.trim_end_matches([' ', '\t', '"', '\'']);
    is_secret_name(before.rsplit(|c: char| !(c.is_alphanumeric() || c == '_' || c == '-')).next().unwrap_or_default())
}

/// Whether what is called so is probably a secret.
pub(crate) fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    SECRET_NAMES.iter().any(|secret| name.contains(secret))
}

/// Hides the value that stands behind an `=` at `start`: a string to its quotes, anything else to the next blank.
fn hide_value(text: &mut [u8], start: usize) {
    let blanks = text[start..].iter().take_while(|byte| b" \t".contains(byte)).count();
    let rest = &mut text[start + blanks..];
    let quotes = match rest {
        [q @ (b'"' | b'\''), a, b, ..] if a == q && b == q => 3,
        [b'"' | b'\'', ..] => 1,
        _ => 0,
    };
    let (quote, value) = rest.split_at_mut(quotes);
    let ends = |at: usize| match quotes {
        0 => b" \t\r\n&\"',}".contains(&value[at]),
        1 => value[at] == quote[0] || value[at] == b'\n',
        _ => value[at..].starts_with(quote),
    };
    let length = (0..value.len()).find(|at| ends(*at)).unwrap_or(value.len());
    hide(&mut value[..length]);
}

/// Replaces every byte but line breaks and `${…}` without a default.
fn hide(secret: &mut [u8]) {
    let mut at = 0;
    while at < secret.len() {
        let reference = reference_length(&secret[at..]);
        if reference == 0 && secret[at] != b'\n' {
            secret[at] = b'*';
        }
        at += reference.max(1);
    }
}

/// The length of the `${…}` that `text` begins with; 0 if there is none, or if it holds a default.
fn reference_length(text: &[u8]) -> usize {
    if !text.starts_with(b"${") {
        return 0;
    }
    match text.iter().position(|byte| *byte == b'}') {
        Some(end) if !text[..end].windows(2).any(|pair| pair == b":-") => end + 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::mask;

    #[test]
    fn secrets_are_hidden_and_all_else_stays() {
        let cases = [
            (r#"url = "postgres://shop:s3cr:t/@x@db/shop""#, r#"url = "postgres://shop:*********@db/shop""#),
            (r#"url = "redis://:${REDIS_PW}@h:6379""#, r#"url = "redis://:${REDIS_PW}@h:6379""#),
            (r#"url = "redis://:${PW:-abc}@h:6379""#, r#"url = "redis://:**********@h:6379""#),
            (
                r#"url = "postgres://db/x?user=a&password=b#c&x=1""#,
                r#"url = "postgres://db/x?user=a&password=***&x=1""#,
            ),
            (r#"url = "host=db password=abc dbname=x""#, r#"url = "host=db password=*** dbname=x""#),
            (r#"token = "abc" # of ops"#, r#"token = "***" # of ops"#),
            ("token = '''a\nbc''' # x", "token = '''*\n**''' # x"),
            ("admin = { token = abc, listen = \"off\" }", "admin = { token = ***, listen = \"off\" }"),
            ("\"my-Password\"='ä'\nx = 1", "\"my-Password\"='**'\nx = 1"),
            ("token = \"abc\nlisten = \"off\"", "token = \"***\nlisten = \"off\""),
            ("key = \"a://{id}\"\nother = \"b@c\"", "key = \"a://{id}\"\nother = \"b@c\""),
            ("pass=", "pass="),
            ("étoken = abc", "étoken = ***"),
            ("é}token = abc", "é}token = ***"),
        ];
        for (text, masked) in cases {
            assert_eq!(mask(text), masked);
        }
    }

    proptest! {
        #[test]
        fn lines_keep_their_length(text in "(pass|token|[a-z=:/@\"'${}é\\r\\n ]|://|\\PC){0,60}") {
            let lengths = |text: &str| text.split('\n').map(str::len).collect::<Vec<_>>();
            prop_assert_eq!(lengths(&mask(&text)), lengths(&text));
        }
    }
}
