//! Values from Postgres's text form to JSON, byte for byte as `row_to_json` shows them.
//!
//! The text forms are those of the types' output functions (`array_out`, `record_out`, `hstore_out`, …) under
//! `TimeZone=UTC`, `DateStyle=ISO`, `IntervalStyle=postgres`, `extra_float_digits=1` and `bytea_output=hex`; the JSON
//! is that of `datum_to_json` (`src/backend/utils/adt/json.c`). Nothing is parsed that need not be: a number or a json
//! value goes through as it is. Only a quoted element with escapes inside an array, a composite or an hstore is copied
//! before it is shown.
//!
//! Text that is not of its type's form is a [`ValueError`], and leaves the output as it was.

use std::sync::Arc;

use crate::decode::types::JsonType;

/// How deep arrays and composites may lie in each other. Postgres doubles escapes at each level, so that no value
/// comes near.
pub const VALUE_DEPTH_MAX: usize = 64;

/// A value is not of its type's text form. Never says what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not UTF-8, although `client_encoding` is.
    #[error("a value is not UTF-8")]
    NotUtf8,
    /// Not what the type's output function writes.
    #[error("a value is not of the text form of {0}")]
    Malformed(&'static str),
    /// Arrays and composites in each other beyond [`VALUE_DEPTH_MAX`].
    #[error("a value nests more than {VALUE_DEPTH_MAX} arrays and composites")]
    TooDeep,
}

type Result = std::result::Result<(), ValueError>;

/// Appends what `row_to_json` makes of a value that is not NULL; on an error `out` is as it was.
pub fn write_json(out: &mut Vec<u8>, json: &JsonType, text: &[u8]) -> Result {
    let begin = out.len();
    write_value(out, json, text, 0).inspect_err(|_| out.truncate(begin))
}

/// Appends a JSON string with the escapes of Postgres's `escape_json`; on an error `out` is as it was.
pub fn write_json_string(out: &mut Vec<u8>, text: &[u8]) -> Result {
    str::from_utf8(text).map_err(|_| ValueError::NotUtf8)?;
    out.push(b'"');
    let mut rest = text;
    loop {
        let (plain, special) = rest.split_at(plain_length(rest));
        out.extend_from_slice(plain);
        let Some((&byte, behind)) = special.split_first() else { break };
        write_escape(out, byte);
        rest = behind;
    }
    out.push(b'"');
    Ok(())
}

fn needs_escape(byte: u8) -> bool {
    byte < b' ' || byte == b'"' || byte == b'\\'
}

/// How many bytes stand before the first that needs an escape.
fn plain_length(text: &[u8]) -> usize {
    // Without a branch per byte the compiler makes vector instructions of it. serde_json, which writes the same
    // escapes, looks at byte after byte and takes twice as long for a column of text.
    const CHUNK: usize = 8;
    let is_plain = |chunk: &&[u8]| !chunk.iter().fold(false, |any, &byte| any | needs_escape(byte));
    let begin = text.chunks_exact(CHUNK).take_while(is_plain).count() * CHUNK;
    let rest = &text[begin..];
    begin + rest.iter().position(|&byte| needs_escape(byte)).unwrap_or(rest.len())
}

fn write_escape(out: &mut Vec<u8>, byte: u8) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let short = match byte {
        0x08 => b'b',
        0x0c => b'f',
        b'\n' => b'n',
        b'\r' => b'r',
        b'\t' => b't',
        b'"' | b'\\' => byte,
        _ => {
            let digits = [HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 0xf)]];
            out.extend_from_slice(b"\\u00");
            return out.extend_from_slice(&digits);
        }
    };
    out.extend_from_slice(&[b'\\', short]);
}

fn write_value(out: &mut Vec<u8>, json: &JsonType, text: &[u8], depth: usize) -> Result {
    if depth > VALUE_DEPTH_MAX {
        return Err(ValueError::TooDeep);
    }
    match json {
        JsonType::Text | JsonType::Date => write_json_string(out, text),
        JsonType::Number if is_json_number(text) => {
            out.extend_from_slice(text);
            Ok(())
        }
        JsonType::Number => write_json_string(out, text),
        JsonType::Bool => write_bool(out, text),
        JsonType::Timestamp => write_timestamp(out, text, b""),
        JsonType::TimestampTz => write_timestamptz(out, text),
        JsonType::Json => write_raw(out, text),
        JsonType::Array { element, delimiter } => write_array(out, element, *delimiter, text, depth),
        JsonType::Vector(element) => write_vector(out, element, text, depth),
        JsonType::Composite(attributes) => write_composite(out, attributes, text, depth),
        JsonType::Hstore => write_hstore(out, text),
    }
}

/// `-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?`
fn is_json_number(text: &[u8]) -> bool {
    fn digits(text: &[u8]) -> Option<&[u8]> {
        let count = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        (count > 0).then(|| &text[count..])
    }
    let rest = || {
        let rest = match text.strip_prefix(b"-").unwrap_or(text) {
            [b'0', rest @ ..] => rest,
            rest => digits(rest)?,
        };
        let rest = match rest {
            [b'.', rest @ ..] => digits(rest)?,
            rest => rest,
        };
        match rest {
            [b'e' | b'E', b'+' | b'-', rest @ ..] | [b'e' | b'E', rest @ ..] => digits(rest),
            rest => Some(rest),
        }
    };
    rest().is_some_and(<[u8]>::is_empty)
}

fn write_bool(out: &mut Vec<u8>, text: &[u8]) -> Result {
    out.extend_from_slice(match text {
        b"t" => b"true",
        b"f" => b"false",
        _ => return Err(ValueError::Malformed("a boolean")),
    });
    Ok(())
}

fn write_raw(out: &mut Vec<u8>, text: &[u8]) -> Result {
    let text = str::from_utf8(text).map_err(|_| ValueError::NotUtf8)?;
    out.extend_from_slice(text.as_bytes());
    Ok(())
}

/// `2024-02-29 12:00:00.5 BC` with a `T` for the first space and `suffix` before the era; `infinity` as it is.
fn write_timestamp(out: &mut Vec<u8>, text: &[u8], suffix: &[u8]) -> Result {
    let begin = out.len();
    let (instant, era) = split_era(text);
    write_json_string(out, instant)?;
    if let Some(space) = out[begin..].iter().position(|&byte| byte == b' ') {
        out[begin + space] = b'T';
    }
    out.pop();
    out.extend_from_slice(suffix);
    out.extend_from_slice(era);
    out.push(b'"');
    Ok(())
}

/// As [`write_timestamp`], with the minutes that `timestamptz_out` leaves out of a whole-hour offset.
fn write_timestamptz(out: &mut Vec<u8>, text: &[u8]) -> Result {
    let whole_hours = matches!(split_era(text).0, [.., b'+' | b'-', b'0'..=b'9', b'0'..=b'9']);
    write_timestamp(out, text, if whole_hours { b":00" } else { b"" })
}

fn split_era(text: &[u8]) -> (&[u8], &[u8]) {
    const ERA: &[u8] = b" BC";
    match text.strip_suffix(ERA) {
        Some(instant) => (instant, ERA),
        None => (text, b""),
    }
}

/// What `array_out` writes: `{1,NULL,"a \"b\""}`, `{{1,2},{3,4}}`, `[0:1]={1,2}`.
fn write_array(out: &mut Vec<u8>, element: &JsonType, delimiter: u8, text: &[u8], depth: usize) -> Result {
    // The subscripts do not show in JSON.
    let bounds = match text {
        [b'[', ..] => text.iter().position(|&byte| byte == b'=').map_or(text.len(), |equals| equals + 1),
        _ => 0,
    };
    let mut array = Array { cursor: Cursor::new(&text[bounds..], "an array"), element, delimiter, scratch: Vec::new() };
    array.write_dimension(out, depth)?;
    array.cursor.end()
}

struct Array<'a> {
    cursor: Cursor<'a>,
    element: &'a JsonType,
    delimiter: u8,
    scratch: Vec<u8>,
}

impl Array<'_> {
    fn write_dimension(&mut self, out: &mut Vec<u8>, depth: usize) -> Result {
        if depth > VALUE_DEPTH_MAX {
            return Err(ValueError::TooDeep);
        }
        self.cursor.expect(b'{')?;
        out.push(b'[');
        if !self.cursor.skip(b'}') {
            loop {
                match self.cursor.peek() {
                    Some(b'{') => self.write_dimension(out, depth + 1)?,
                    _ => self.write_element(out, depth + 1)?,
                }
                if !self.cursor.skip(self.delimiter) {
                    break;
                }
                out.push(b',');
            }
            self.cursor.expect(b'}')?;
        }
        out.push(b']');
        Ok(())
    }

    fn write_element(&mut self, out: &mut Vec<u8>, depth: usize) -> Result {
        let delimiter = self.delimiter;
        match self.cursor.item(&mut self.scratch, |byte| byte == delimiter || byte == b'}')? {
            Item::Bare(b"NULL") => write_null(out),
            Item::Bare(b"") => Err(self.cursor.malformed()),
            Item::Bare(text) | Item::Quoted(text) => write_value(out, self.element, text, depth),
        }
    }
}

/// What `int2vectorout` and `oidvectorout` write: `1 2 3`.
fn write_vector(out: &mut Vec<u8>, element: &JsonType, text: &[u8], depth: usize) -> Result {
    out.push(b'[');
    for (index, item) in text.split(|&byte| byte == b' ').filter(|item| !item.is_empty()).enumerate() {
        if index > 0 {
            out.push(b',');
        }
        write_value(out, element, item, depth + 1)?;
    }
    out.push(b']');
    Ok(())
}

/// What `record_out` writes: `(1,,"a ""b""")`, where nothing at all is a NULL.
fn write_composite(out: &mut Vec<u8>, attributes: &[(String, Arc<JsonType>)], text: &[u8], depth: usize) -> Result {
    let mut cursor = Cursor::new(text, "a composite type");
    let mut scratch = Vec::new();
    cursor.expect(b'(')?;
    out.push(b'{');
    for (index, (name, json)) in attributes.iter().enumerate() {
        if index > 0 {
            cursor.expect(b',')?;
            out.push(b',');
        }
        write_json_string(out, name.as_bytes())?;
        out.push(b':');
        match cursor.item(&mut scratch, |byte| byte == b',' || byte == b')')? {
            Item::Bare(b"") => write_null(out)?,
            Item::Bare(text) | Item::Quoted(text) => write_value(out, json, text, depth + 1)?,
        }
    }
    cursor.expect(b')')?;
    out.push(b'}');
    cursor.end()
}

/// What `hstore_out` writes: `"a"=>"1", "b"=>NULL`; spaced as `hstore_to_json` spaces it.
fn write_hstore(out: &mut Vec<u8>, text: &[u8]) -> Result {
    let mut cursor = Cursor::new(text, "an hstore");
    out.push(b'{');
    if !text.is_empty() {
        write_hstore_pair(out, &mut cursor)?;
        while cursor.skip(b',') {
            cursor.expect(b' ')?;
            out.extend_from_slice(b", ");
            write_hstore_pair(out, &mut cursor)?;
        }
    }
    out.push(b'}');
    cursor.end()
}

fn write_hstore_pair(out: &mut Vec<u8>, cursor: &mut Cursor<'_>) -> Result {
    let mut scratch = Vec::new();
    match cursor.item(&mut scratch, |byte| byte == b'=')? {
        Item::Quoted(key) => write_json_string(out, key)?,
        Item::Bare(_) => return Err(cursor.malformed()),
    }
    cursor.expect(b'=')?;
    cursor.expect(b'>')?;
    out.extend_from_slice(b": ");
    match cursor.item(&mut scratch, |byte| byte == b',')? {
        Item::Quoted(value) => write_json_string(out, value),
        Item::Bare(b"NULL") => write_null(out),
        Item::Bare(_) => Err(cursor.malformed()),
    }
}

fn write_null(out: &mut Vec<u8>) -> Result {
    out.extend_from_slice(b"null");
    Ok(())
}

/// A piece of a container's text.
enum Item<'a> {
    Bare(&'a [u8]),
    Quoted(&'a [u8]),
}

/// What is left to read of a container's text.
struct Cursor<'a> {
    rest: &'a [u8],
    container: &'static str,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a [u8], container: &'static str) -> Self {
        Cursor { rest: text, container }
    }

    fn malformed(&self) -> ValueError {
        ValueError::Malformed(self.container)
    }

    fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    fn skip(&mut self, byte: u8) -> bool {
        let next = self.rest.strip_prefix(&[byte]);
        self.rest = next.unwrap_or(self.rest);
        next.is_some()
    }

    fn expect(&mut self, byte: u8) -> Result {
        self.skip(byte).then_some(()).ok_or(self.malformed())
    }

    fn end(&self) -> Result {
        self.rest.is_empty().then_some(()).ok_or(self.malformed())
    }

    fn advance(&mut self, count: usize) -> &'a [u8] {
        let (passed, rest) = self.rest.split_at(count);
        self.rest = rest;
        passed
    }

    /// The next piece: up to where `ends` says so, or in quotes. Only a piece with escapes is copied, to `scratch`.
    fn item<'s>(
        &mut self,
        scratch: &'s mut Vec<u8>,
        ends: impl Fn(u8) -> bool,
    ) -> std::result::Result<Item<'s>, ValueError>
    where
        'a: 's,
    {
        if self.skip(b'"') {
            return self.quoted(scratch).map(Item::Quoted);
        }
        let length = self.rest.iter().position(|&byte| ends(byte)).unwrap_or(self.rest.len());
        match self.advance(length) {
            // Every output function quotes what holds one of these.
            bare if bare.iter().any(|byte| matches!(byte, b'"' | b'\\')) => Err(self.malformed()),
            bare => Ok(Item::Bare(bare)),
        }
    }

    /// The rest of a piece in quotes. A backslash makes the next byte plain, and a doubled quote is a quote.
    fn quoted<'s>(&mut self, scratch: &'s mut Vec<u8>) -> std::result::Result<&'s [u8], ValueError>
    where
        'a: 's,
    {
        scratch.clear();
        loop {
            let special = |&byte: &u8| matches!(byte, b'"' | b'\\');
            let plain = self.rest.iter().position(special).ok_or(self.malformed())?;
            let plain = self.advance(plain);
            match *self.rest {
                [b'"', b'"', ..] | [b'\\', _, ..] => {
                    scratch.extend_from_slice(plain);
                    scratch.push(self.rest[1]);
                    self.advance(2);
                }
                [b'"', ..] => {
                    self.advance(1);
                    if scratch.is_empty() {
                        return Ok(plain);
                    }
                    scratch.extend_from_slice(plain);
                    return Ok(scratch);
                }
                _ => return Err(self.malformed()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array_of(element: JsonType) -> JsonType {
        JsonType::Array { element: Arc::new(element), delimiter: b',' }
    }

    fn composite_of(attributes: &[(&str, JsonType)]) -> JsonType {
        let attribute = |(name, json): &(&str, JsonType)| ((*name).to_owned(), Arc::new(json.clone()));
        JsonType::Composite(attributes.iter().map(attribute).collect())
    }

    #[track_caller]
    fn check(json: &JsonType, cases: &[(&str, &str)]) {
        for (text, expected) in cases {
            let mut out = b"before".to_vec();
            write_json(&mut out, json, text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(String::from_utf8_lossy(&out), format!("before{expected}"), "{text}");
        }
    }

    #[track_caller]
    fn refuse(json: &JsonType, error: ValueError, texts: &[&[u8]]) {
        for text in texts {
            let mut out = b"before".to_vec();
            assert_eq!(write_json(&mut out, json, text), Err(error), "{}", String::from_utf8_lossy(text));
            assert_eq!(out, b"before");
        }
    }

    #[test]
    fn scalars() {
        check(&JsonType::Bool, &[("t", "true"), ("f", "false")]);
        check(&JsonType::Date, &[("2024-02-29", r#""2024-02-29""#), ("0044-03-15 BC", r#""0044-03-15 BC""#)]);
        check(&JsonType::Json, &[(r#"{"a" : [1]}"#, r#"{"a" : [1]}"#)]);
        refuse(&JsonType::Bool, ValueError::Malformed("a boolean"), &[b"", b"true"]);
        for json in [JsonType::Text, JsonType::Json, JsonType::Number] {
            refuse(&json, ValueError::NotUtf8, &[b"\xFF", b"abc\xC3"]);
        }
    }

    #[test]
    fn numbers_go_through_and_what_json_has_no_number_for_is_quoted() {
        for number in ["0", "-0", "10", "-1.50", "1e+300", "5e-324", "0.1E5", "12345678901234567890.5"] {
            check(&JsonType::Number, &[(number, number)]);
        }
        for other in ["NaN", "Infinity", "-Infinity", "", "-", "01", "1.", ".5", "1e", "1e+", "0x1", "1 "] {
            check(&JsonType::Number, &[(other, &format!("\"{other}\""))]);
        }
    }

    #[test]
    fn strings_are_escaped_as_postgres_escapes_them() {
        check(
            &JsonType::Text,
            &[
                ("", r#""""#),
                ("a \"b\" \\ /", r#""a \"b\" \\ /""#),
                ("\u{8}\u{c}\n\r\t", r#""\b\f\n\r\t""#),
                ("\u{1}\u{b}\u{1f}\u{7f}", "\"\\u0001\\u000b\\u001f\u{7f}\""),
                ("ü€😀\u{2028}", "\"ü€😀\u{2028}\""),
            ],
        );
    }

    #[test]
    fn timestamps_get_a_t_and_a_full_offset() {
        check(
            &JsonType::Timestamp,
            &[
                ("2024-02-29 12:00:00.5", r#""2024-02-29T12:00:00.5""#),
                ("0044-03-15 00:00:00 BC", r#""0044-03-15T00:00:00 BC""#),
                ("infinity", r#""infinity""#),
            ],
        );
        check(
            &JsonType::TimestampTz,
            &[
                ("2024-02-29 12:00:00+00", r#""2024-02-29T12:00:00+00:00""#),
                ("2024-02-29 12:00:00-03:30", r#""2024-02-29T12:00:00-03:30""#),
                ("10000-01-01 00:00:00.25+00", r#""10000-01-01T00:00:00.25+00:00""#),
                ("0044-03-15 12:00:00+00 BC", r#""0044-03-15T12:00:00+00:00 BC""#),
                ("-infinity", r#""-infinity""#),
            ],
        );
    }

    #[test]
    fn arrays() {
        check(
            &array_of(JsonType::Number),
            &[
                ("{}", "[]"),
                ("{1,NULL,-2.5}", "[1,null,-2.5]"),
                ("{{1,2},{3,4}}", "[[1,2],[3,4]]"),
                ("[0:1]={1,2}", "[1,2]"),
                ("[-1:0][2:2]={{1},{2}}", "[[1],[2]]"),
                ("{NaN}", r#"["NaN"]"#),
            ],
        );
        check(
            &array_of(JsonType::Text),
            &[
                (r#"{"",a,"NULL",null_,"a b"}"#, r#"["","a","NULL","null_","a b"]"#),
                (r#"{"a\"b\\c","{,}"}"#, r#"["a\"b\\c","{,}"]"#),
                ("{=,[}", r#"["=","["]"#),
            ],
        );
        check(&array_of(JsonType::Json), &[(r#"{"{\"a\": \"\\\\\"}",1,"null"}"#, r#"[{"a": "\\"},1,null]"#)]);
        check(
            &array_of(JsonType::Timestamp),
            &[(r#"{"2024-01-01 00:00:00",NULL}"#, r#"["2024-01-01T00:00:00",null]"#)],
        );
        // A domain over an array as an element.
        check(&array_of(array_of(JsonType::Bool)), &[(r#"{"{t,f}",{},NULL}"#, "[[true,false],[],null]")]);
        let boxes = JsonType::Array { element: Arc::new(JsonType::Text), delimiter: b';' };
        check(&boxes, &[("{(1,1),(0,0);(2,2),(1,1)}", r#"["(1,1),(0,0)","(2,2),(1,1)"]"#)]);
        let malformed: &[&[u8]] = &[
            b"",
            b"{",
            b"}",
            b"{1",
            b"{1,}",
            b"{,1}",
            b"{1}}",
            b"{1}x",
            b"{\"1}",
            b"{\"1\\",
            b"{1\"2\"}",
            b"[0:1]",
            b"1",
        ];
        refuse(&array_of(JsonType::Number), ValueError::Malformed("an array"), malformed);
    }

    #[test]
    fn vectors() {
        let json = JsonType::Vector(Arc::new(JsonType::Number));
        check(&json, &[("", "[]"), ("1", "[1]"), ("1 -2 3", "[1,-2,3]")]);
        let json = JsonType::Vector(Arc::new(JsonType::Text));
        check(&json, &[("16384 25", r#"["16384","25"]"#)]);
    }

    #[test]
    fn composites() {
        let inner = composite_of(&[("x", JsonType::Number), ("tags", array_of(JsonType::Text))]);
        let json = composite_of(&[("a \"b\"", JsonType::Text), ("ok", JsonType::Bool), ("inner", inner)]);
        check(
            &json,
            &[
                ("(,,)", r#"{"a \"b\"":null,"ok":null,"inner":null}"#),
                (r#"("",t,"(1,)")"#, r#"{"a \"b\"":"","ok":true,"inner":{"x":1,"tags":null}}"#),
                (
                    r#"("say ""hi"" \\ (you)",f,"(-1,""{a,""""b c"""",""""\\\\""""""""}"")")"#,
                    r#"{"a \"b\"":"say \"hi\" \\ (you)","ok":false,"inner":{"x":-1,"tags":["a","b c","\""]}}"#,
                ),
            ],
        );
        check(&composite_of(&[("only", JsonType::Number)]), &[("()", r#"{"only":null}"#), ("(7)", r#"{"only":7}"#)]);
        check(&composite_of(&[]), &[("()", "{}")]);
        check(
            &array_of(composite_of(&[("n", JsonType::Number)])),
            &[(r#"{(1),"()",NULL}"#, r#"[{"n":1},{"n":null},null]"#)],
        );
        let malformed: &[&[u8]] = &[b"", b"(", b"(,", b"(,,", b"(,,,)", b"(,,)x", b"(\",,)", b"(a\",,)", b",,)"];
        refuse(&json, ValueError::Malformed("a composite type"), malformed);
    }

    #[test]
    fn hstores() {
        check(
            &JsonType::Hstore,
            &[
                ("", "{}"),
                (r#""a"=>"1""#, r#"{"a": "1"}"#),
                (r#""a"=>NULL, "b c"=>"NULL", "\"\\"=>"""#, r#"{"a": null, "b c": "NULL", "\"\\": ""}"#),
            ],
        );
        let malformed: &[&[u8]] =
            &[b"a", b"\"a\"", b"\"a\"=>", b"\"a\"=>1", b"\"a\"=>\"1\",", b"\"a\"=>\"1\", ", b"NULL=>\"1\""];
        refuse(&JsonType::Hstore, ValueError::Malformed("an hstore"), malformed);
    }

    #[test]
    fn depth_is_limited() {
        let braces = "{".repeat(100_000);
        refuse(&array_of(JsonType::Number), ValueError::TooDeep, &[braces.as_bytes()]);
        let nested = (0..=VALUE_DEPTH_MAX).fold(JsonType::Number, |inner, _| composite_of(&[("a", inner)]));
        let parens = "(".repeat(VALUE_DEPTH_MAX + 1) + "1";
        refuse(&nested, ValueError::TooDeep, &[parens.as_bytes()]);
    }
}
