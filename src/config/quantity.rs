//! Durations, sizes, shares and rates as people write them: `12h`, `8GiB`, `10%`, `5000/s`.
//!
//! Every quantity is a string with its unit, so that no number in the file leaves open what it counts.

use std::ops::Range;
use std::time::Duration;

use humantime::DurationError;

use super::code::Code;
use super::mistake::Mistake;

/// A duration such as `12h`, `1d`, `100ms` or `1h 30m`, in whole milliseconds; zero needs no unit.
pub(super) fn duration(text: &str) -> Result<Duration, Mistake> {
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        let mistake = Mistake::whole(Code::Quantity, text, "has no unit").label("of what?");
        return Err(match text.parse() {
            Ok(seconds) => mistake.help(format!("for seconds write {}", seconds_written(seconds))),
            Err(_) => mistake,
        });
    }
    let fail = |range: Range<usize>, label: &str| {
        let mistake = Mistake::whole(Code::Quantity, text, "is not a duration").label(label);
        let range =
            if text.is_char_boundary(range.start) && text.is_char_boundary(range.end) { range } else { 0..text.len() };
        Err(Mistake { range, ..mistake }
            .help("durations are like \"100ms\", \"30s\", \"5m\", \"12h\", \"1d\", \"1h 30m\""))
    };
    let all = 0..text.len();
    match humantime::parse_duration(text) {
        Ok(duration) if duration.subsec_nanos() % 1_000_000 != 0 => fail(all, "finer than a millisecond"),
        Ok(duration) => Ok(duration),
        Err(DurationError::UnknownUnit { start, end, .. }) => fail(start..end, "no unit of time"),
        Err(DurationError::InvalidCharacter(at) | DurationError::NumberExpected(at)) => {
            let length = text.get(at..).and_then(|rest| rest.chars().next()).map_or(0, char::len_utf8);
            fail(at..at + length, "")
        }
        Err(DurationError::NumberOverflow) => fail(all, "too long"),
        Err(DurationError::Empty) => fail(all, "empty"),
    }
}

/// `300` → `"300s" or "5m"`.
pub(super) fn seconds_written(seconds: u64) -> String {
    let plain = format!("{seconds}s");
    let short = duration_written(Duration::from_secs(seconds));
    if short == plain { format!("\"{plain}\"") } else { format!("\"{plain}\" or \"{short}\"") }
}

/// A duration in the largest unit that divides it: `12h`.
pub(crate) fn duration_written(duration: Duration) -> String {
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s"), (1, "ms")];
    written(duration.as_millis(), units).unwrap_or_else(|| "0s".to_owned())
}

/// The units of [`size`] and how many bytes they are.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("kB", 1_000),
    ("KiB", 1 << 10),
    ("MB", 1_000_000),
    ("MiB", 1 << 20),
    ("GB", 1_000_000_000),
    ("GiB", 1 << 30),
    ("TB", 1_000_000_000_000),
    ("TiB", 1 << 40),
];

/// A number of bytes such as `8GiB` or `512MB`.
pub(super) fn size(text: &str) -> Result<u64, Mistake> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(digits);
    let unit = rest.trim();
    let mistake =
        Mistake::whole(Code::Quantity, text, "is not a size").help("sizes are like \"64KiB\", \"512MB\", \"8GiB\"");
    if number.is_empty() {
        return Err(mistake);
    }
    if unit.is_empty() {
        return Err(Mistake::whole(Code::Quantity, text, "has no unit")
            .label("of what?")
            .help(format!("for bytes write \"{number}B\"; other units are `KiB`, `MB`, `MiB`, `GB`, `GiB`")));
    }
    let Some((_, factor)) = SIZE_UNITS.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) else {
        return Err(Mistake { range: digits..text.len(), ..mistake.label("no unit of size") });
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    bytes.ok_or_else(|| mistake.label("too large"))
}

/// A share from `0%` to below `100%`.
pub(super) fn share(text: &str) -> Result<f64, Mistake> {
    let mistake =
        |problem: &str| Err(Mistake::whole(Code::Quantity, text, problem).help("shares are like \"10%\", \"2.5%\""));
    let Some(number) = text.strip_suffix('%') else {
        return mistake("is not a share");
    };
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    match number.trim().parse::<f64>() {
        Ok(percent) if plain && percent < 100.0 => Ok(percent / 100.0),
        Ok(_) if plain => mistake("must stay below 100%"),
        _ => mistake("is not a share"),
    }
}

/// So many rows a second, as `5000/s`; `off` is no limit.
pub(super) fn rows_per_second(text: &str) -> Result<Option<u64>, Mistake> {
    if text == "off" {
        return Ok(None);
    }
    let mistake =
        || Mistake::whole(Code::Quantity, text, "is not a number of rows per second").help("rates are like \"5000/s\"");
    let number = text.strip_suffix("/s").ok_or_else(mistake)?;
    match number.parse() {
        Ok(0) => Err(Mistake::whole(Code::Quantity, text, "lets no row through").help("\"off\" is no limit")),
        Ok(rows) if number.bytes().all(|byte| byte.is_ascii_digit()) => Ok(Some(rows)),
        _ => Err(mistake()),
    }
}

/// The units of time of [`share_per_minute`] and how many minutes they are.
const RATE_UNITS: [(&str, f64); 3] = [("/min", 1.0), ("/h", 60.0), ("/d", 1_440.0)];

/// The share of the rows that each minute takes, up to all of them: from `0.1%/min`, `5%/h` or `100%/d`; `off` is none.
pub(super) fn share_per_minute(text: &str) -> Result<Option<f64>, Mistake> {
    if text == "off" {
        return Ok(None);
    }
    let mistake = |problem: &str| {
        Mistake::whole(Code::Quantity, text, problem)
            .help("rates are like \"0.1%/min\", \"5%/h\", \"100%/d\"; \"off\" is none")
    };
    let unit = RATE_UNITS.into_iter().find_map(|(unit, minutes)| Some((text.strip_suffix(unit)?, minutes)));
    let (share, minutes) = unit.ok_or_else(|| mistake("is not a share of the rows per time"))?;
    let plain = |number: &&str| number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let percent = share.strip_suffix('%').filter(plain).and_then(|number| number.parse::<f64>().ok());
    let percent = percent.ok_or_else(|| mistake("is not a share of the rows per time"))?;
    let per_minute = percent / 100.0 / minutes;
    match per_minute {
        _ if per_minute <= 0.0 => Err(mistake("compares no row")),
        _ if per_minute > 1.0 => Err(mistake("is more than every row each minute")),
        _ => Ok(Some(per_minute)),
    }
}

/// Bytes in the largest unit that divides them: `4MiB`.
pub(crate) fn size_written(bytes: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "B")];
    written(u128::from(bytes), units).unwrap_or_else(|| "0B".to_owned())
}

/// The amount in the first unit that divides it; `None` for nothing at all.
fn written(amount: u128, units: [(u128, &str); 5]) -> Option<String> {
    let (length, unit) = units.into_iter().find(|(length, _)| amount >= *length && amount.is_multiple_of(*length))?;
    Some(format!("{}{unit}", amount / length))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantities_are_read() {
        assert_eq!(duration("1h 30m").unwrap(), Duration::from_secs(5_400));
        assert_eq!(duration("100ms").unwrap(), Duration::from_millis(100));
        assert_eq!(duration("0s").unwrap(), Duration::ZERO);
        assert_eq!(duration("0").unwrap(), Duration::ZERO);
        assert_eq!(size("8GiB").unwrap(), 8 << 30);
        assert_eq!(size("512 mb").unwrap(), 512_000_000);
        assert_eq!(size("0B").unwrap(), 0);
        assert_eq!(share("10%").unwrap().to_bits(), 0.1_f64.to_bits());
        assert_eq!(share("0%").unwrap().to_bits(), 0.0_f64.to_bits());
        assert_eq!((rows_per_second("5000/s"), rows_per_second("off")), (Ok(Some(5000)), Ok(None)));
        assert_eq!((share_per_minute("25%/min"), share_per_minute("off")), (Ok(Some(0.25)), Ok(None)));
        assert_eq!((share_per_minute("60%/h"), share_per_minute("72%/d")), (Ok(Some(0.01)), Ok(Some(0.0005))));
    }

    #[test]
    fn mistakes_are_named_at_their_place() {
        let durations = ["", "300", "12x", "h", "-5s", "1us", "99999999999999999999d", "12 µ"];
        let shown = |text: &str, mistake: Mistake| {
            let wrong = &text[mistake.range.clone()];
            format!("{text:?} {} at {wrong:?} ({}); {}", mistake.problem, mistake.label, mistake.help.join("; "))
        };
        let mut all: Vec<String> = durations.map(|text| shown(text, duration(text).unwrap_err())).into();
        all.extend(["", "8", "GiB", "8 XB", "99999999999TiB", "-1B"].map(|text| shown(text, size(text).unwrap_err())));
        all.extend(["", "0.1", "100%", "-1%", "%", "1e1%", "inf%"].map(|text| shown(text, share(text).unwrap_err())));
        let rates = ["", "5000", "5000/min", "0/s", "+1/s", "99999999999999999999/s", "1.5/s"];
        all.extend(rates.map(|text| shown(text, rows_per_second(text).unwrap_err())));
        let shares = ["", "1%", "1/min", "1%/s", "0%/min", "101%/min", "-1%/h", "%/d", "1e1%/min"];
        all.extend(shares.map(|text| shown(text, share_per_minute(text).unwrap_err())));
        insta::assert_snapshot!(all.join("\n"));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused_at_a_place_in_it(text in "([0-9]{0,20}|[a-zA-Z%µ]{0,3}|\\PC| ){0,4}") {
            for mistake in [duration(&text).err(), size(&text).err(), share(&text).err()].into_iter().flatten() {
                prop_assert!(text.get(mistake.range).is_some());
            }
        }

        #[test]
        fn what_is_written_is_read_back(number in 0_u64..1 << 44) {
            prop_assert_eq!(size(&size_written(number)).unwrap(), number);
            let time = Duration::from_millis(number);
            prop_assert_eq!(duration(&duration_written(time)).unwrap(), time);
        }
    }
}
