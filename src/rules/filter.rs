//! The filters of key templates: `{column|lower}`, chained from left to right.
//!
//! A filter changes the bytes that a placeholder has put at the end of the key, in place: the usual ones allocate
//! nothing beyond the key itself.

use md5::Md5;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a placeholder does to a value before it goes into the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// `lower`: lower case, by Unicode's rules for every language.
    Lower,
    /// `upper`: upper case, by Unicode's rules for every language.
    Upper,
    /// `urlencode`: everything but letters, digits and `-._~` as `%XX` (RFC 3986 §2.3).
    UrlEncode,
    /// `md5`: 32 hexadecimal digits in lower case.
    Md5,
    /// `sha256`: 64 hexadecimal digits in lower case.
    Sha256,
}

impl Filter {
    /// Every filter, in the order in which messages list them.
    pub const ALL: [Filter; 5] = [Self::Lower, Self::Upper, Self::UrlEncode, Self::Md5, Self::Sha256];

    /// Its name in templates.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lower => "lower",
            Self::Upper => "upper",
            Self::UrlEncode => "urlencode",
            Self::Md5 => "md5",
            Self::Sha256 => "sha256",
        }
    }

    /// The filter of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|filter| filter.name() == name)
    }

    /// Whether different values stay different. The digests count as such: that two rows of one table collide is
    /// less likely than a broken machine.
    pub fn is_injective(self) -> bool {
        match self {
            Self::UrlEncode | Self::Md5 | Self::Sha256 => true,
            Self::Lower | Self::Upper => false,
        }
    }

    /// Replaces what stands in `out` from `start` on.
    pub(super) fn apply(self, out: &mut Vec<u8>, start: usize) {
        match self {
            Self::Lower => change_case(out, start, <[u8]>::make_ascii_lowercase, str::to_lowercase),
            Self::Upper => change_case(out, start, <[u8]>::make_ascii_uppercase, str::to_uppercase),
            Self::UrlEncode => url_encode(out, start),
            Self::Md5 => digest::<Md5>(out, start),
            Self::Sha256 => digest::<Sha256>(out, start),
        }
    }
}

/// Whether `urlencode` leaves the byte as it is.
pub(super) fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~')
}

/// The digits of `%XX`.
pub(super) const UPPER_HEX: &[u8; 16] = b"0123456789ABCDEF";
const LOWER_HEX: &[u8; 16] = b"0123456789abcdef";

fn change_case(out: &mut Vec<u8>, start: usize, ascii: fn(&mut [u8]), unicode: fn(&str) -> String) {
    let value = &mut out[start..];
    match std::str::from_utf8(value) {
        Ok(text) if !text.is_ascii() => {
            let changed = unicode(text);
            out.truncate(start);
            out.extend_from_slice(changed.as_bytes());
        }
        _ => ascii(value),
    }
}

/// From the last byte to the first, so that nothing is overwritten before it was read.
fn url_encode(out: &mut Vec<u8>, start: usize) {
    let end = out.len();
    let escaped = out[start..].iter().filter(|byte| !is_unreserved(**byte)).count();
    let mut to = end + 2 * escaped;
    out.resize(to, 0);
    for from in (start..end).rev() {
        let byte = out[from];
        if is_unreserved(byte) {
            to -= 1;
            out[to] = byte;
        } else {
            to -= 3;
            out[to..to + 3].copy_from_slice(&percent(byte));
        }
    }
}

/// `%XX`
pub(super) fn percent(byte: u8) -> [u8; 3] {
    [b'%', UPPER_HEX[usize::from(byte >> 4)], UPPER_HEX[usize::from(byte & 15)]]
}

fn digest<D: Digest>(out: &mut Vec<u8>, start: usize) {
    let digest = D::digest(&out[start..]);
    out.truncate(start);
    out.extend(digest.iter().flat_map(|byte| [LOWER_HEX[usize::from(byte >> 4)], LOWER_HEX[usize::from(byte & 15)]]));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(filter: Filter, value: &str) -> String {
        let mut out = format!("kept:{value}").into_bytes();
        filter.apply(&mut out, 5);
        String::from_utf8(out).expect("UTF-8 stays UTF-8")
    }

    #[test]
    fn filters_change_only_what_follows_start() {
        let cases = [
            (Filter::Lower, "AbC-1", "abc-1"),
            (Filter::Lower, "ÀÉÎ Σ", "àéî σ"),
            (Filter::Upper, "straße", "STRASSE"),
            (Filter::Upper, "id", "ID"),
            (Filter::UrlEncode, "", ""),
            (Filter::UrlEncode, "a-b_c.d~e", "a-b_c.d~e"),
            (Filter::UrlEncode, "a b:c/é%", "a%20b%3Ac%2F%C3%A9%25"),
            (Filter::Md5, "", "d41d8cd98f00b204e9800998ecf8427e"),
            (Filter::Md5, "hello", "5d41402abc4b2a76b9719d911017c592"),
            (Filter::Sha256, "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ];
        for (filter, value, expected) in cases {
            assert_eq!(applied(filter, value), format!("kept:{expected}"), "{} of {value:?}", filter.name());
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_keep_their_length() {
        let mut out = b"A\xffB".to_vec();
        Filter::Lower.apply(&mut out, 0);
        assert_eq!(out, b"a\xffb");
    }

    #[test]
    fn every_filter_is_found_by_its_name() {
        for filter in Filter::ALL {
            assert_eq!(Filter::from_name(filter.name()), Some(filter));
        }
    }
}
