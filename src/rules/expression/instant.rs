//! Points in time and spans between them, from and to Postgres's text forms.
//!
//! A point is counted as Postgres counts it, in microseconds from 2000-01-01 00:00 UTC, so that every `timestamptz`
//! has a number. A `timestamp` and a `date` are taken as UTC, which is the session's time zone.

use std::fmt;

use super::EvalError;

/// A `date`, `timestamp` or `timestamptz`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Instant {
    /// Microseconds from 2000-01-01 00:00 UTC; the largest and the smallest number are `infinity` and `-infinity`.
    pub(super) us: i64,
    /// Which type it is shown as.
    pub(super) form: Form,
}

/// How a point in time is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Date,
    Timestamp,
    TimestampTz,
}

const DAY_US: i64 = 86_400_000_000;
/// Days from 1970-01-01 to 2000-01-01.
const POSTGRES_EPOCH_DAYS: i64 = 10_957;

impl Instant {
    /// Reads Postgres's ISO form and RFC 3339's: `2024-02-29`, `2024-02-29 12:00:00.5+00`, `2024-02-29T12:00:00Z`,
    /// `0044-03-15 BC`, `infinity`. Without an offset it is UTC. Of the dates that no timestamp reaches (after the year
    /// 294276) there is none.
    pub(super) fn parse(text: &str, form: Form) -> Option<Self> {
        let us = match text {
            "infinity" => i64::MAX,
            "-infinity" => i64::MIN,
            _ => parse_us(text)?,
        };
        Some(Instant { us, form })
    }

    /// As the type's output function writes it: a blank for JSON's `T`, and the offset without minutes.
    pub(super) fn text(self) -> String {
        self.to_string().replacen('T', " ", 1).replacen("+00:00", "+00", 1)
    }

    /// Seconds from 1970-01-01 00:00 UTC, downwards to a whole number.
    pub(super) fn unix_seconds(self) -> Result<i64, EvalError> {
        if self.is_infinite() {
            return Err(EvalError::Overflow);
        }
        Ok(self.us.div_euclid(1_000_000) + POSTGRES_EPOCH_DAYS * 86_400)
    }

    pub(super) fn is_infinite(self) -> bool {
        matches!(self.us, i64::MAX | i64::MIN)
    }

    /// Later by `span_us`; infinity stays what it is, and a date becomes a timestamp.
    pub(super) fn later(self, span_us: i64) -> Result<Self, EvalError> {
        let form = if self.form == Form::Date { Form::Timestamp } else { self.form };
        if self.is_infinite() {
            return Ok(Instant { form, ..self });
        }
        let us = self.us.checked_add(span_us).ok_or(EvalError::Overflow)?;
        Ok(Instant { us, form })
    }

    /// The span from `other` to it, in microseconds.
    pub(super) fn since(self, other: Self) -> Result<i64, EvalError> {
        if self.is_infinite() || other.is_infinite() {
            return Err(EvalError::Overflow);
        }
        self.us.checked_sub(other.us).ok_or(EvalError::Overflow)
    }
}

impl fmt::Display for Instant {
    /// As `row_to_json` shows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.us {
            i64::MAX => return f.write_str("infinity"),
            i64::MIN => return f.write_str("-infinity"),
            _ => {}
        }
        let (year, month, day) = civil_from_days(self.us.div_euclid(DAY_US) + POSTGRES_EPOCH_DAYS);
        // There is no year 0: before 1 AD comes 1 BC.
        let (shown_year, era) = if year > 0 { (year, "") } else { (1 - year, " BC") };
        write!(f, "{shown_year:04}-{month:02}-{day:02}")?;
        if self.form != Form::Date {
            let time_us = self.us.rem_euclid(DAY_US);
            let (seconds, fraction) = (time_us / 1_000_000, time_us % 1_000_000);
            write!(f, "T{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)?;
            if fraction > 0 {
                write!(f, ".{}", format!("{fraction:06}").trim_end_matches('0'))?;
            }
        }
        let offset = if self.form == Form::TimestampTz { "+00:00" } else { "" };
        write!(f, "{offset}{era}")
    }
}

fn parse_us(text: &str) -> Option<i64> {
    let (text, before_christ) = text.strip_suffix(" BC").map_or((text, false), |text| (text, true));
    let (date, time) = match text.find([' ', 'T']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let mut parts = date.split('-');
    let (year, month, day) = (parts.next()?, two_digits(parts.next()?)?, two_digits(parts.next()?)?);
    if parts.next().is_some() || year.len() < 4 {
        return None;
    }
    let year = match digits(year)? {
        0 => return None,
        year if before_christ => 1 - year,
        year => year,
    };
    let days = days_from_civil(year, month, day)? - POSTGRES_EPOCH_DAYS;
    days.checked_mul(DAY_US)?.checked_add(time.map_or(Some(0), parse_time)?)
}

/// `12:00:00`, `12:00:00.5+00`, `12:00:00Z`, `12:00:00-03:30`: microseconds from midnight UTC of the date before it.
fn parse_time(text: &str) -> Option<i64> {
    let (clock, offset_s) = match text.find(['Z', '+', '-']) {
        Some(at) => (&text[..at], parse_offset(&text[at..])?),
        None => (text, 0),
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let mut parts = clock.split(':');
    let (hour, minute) = (two_digits(parts.next()?)?, two_digits(parts.next()?)?);
    let second = parts.next().map_or(Some(0), two_digits)?;
    if parts.next().is_some() || hour > 24 || minute > 59 || second > 60 || fraction.len() > 9 {
        return None;
    }
    // Beyond microseconds digits are dropped, as nothing in the tables has them.
    let fraction_us = digits(format!("{fraction:0<6}").get(..6)?)?;
    Some((hour * 3600 + minute * 60 + second - offset_s) * 1_000_000 + fraction_us)
}

/// `Z`, `+00`, `-03:30`, `+01:22:45`: seconds.
fn parse_offset(text: &str) -> Option<i64> {
    if text == "Z" {
        return Some(0);
    }
    let sign = if text.starts_with('-') { -1 } else { 1 };
    let mut seconds = 0;
    let mut unit = 3600;
    for part in text[1..].split(':') {
        seconds += two_digits(part).filter(|_| unit > 0)? * unit;
        unit /= 60;
    }
    Some(sign * seconds)
}

fn two_digits(text: &str) -> Option<i64> {
    (text.len() == 2).then(|| digits(text)).flatten()
}

/// Digits only: no sign.
fn digits(text: &str) -> Option<i64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Days from 1970-01-01 in the proleptic Gregorian calendar (Howard Hinnant, "chrono-Compatible Low-Level Date
/// Algorithms"); `None` for a day that the month does not have.
fn days_from_civil(year: i64, month: i64, day: i64) -> Option<i64> {
    const YEAR_END: i64 = 6_000_000;
    if !(1..=12).contains(&month) || day < 1 || year > YEAR_END {
        return None;
    }
    let shifted_year = if month <= 2 { year - 1 } else { year };
    let era = shifted_year.div_euclid(400);
    let year_of_era = shifted_year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let days = era * 146_097 + day_of_era - 719_468;
    (civil_from_days(days) == (year, month, day)).then_some(days)
}

/// The inverse.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

/// Reads a span as people write it, `1h30m`, `-5m`, `250ms`, `1d`: microseconds.
pub(super) fn parse_span(text: &str) -> Option<i64> {
    let (sign, unsigned) = text.strip_prefix('-').map_or((1, text), |unsigned| (-1, unsigned));
    let span = humantime::parse_duration(unsigned).ok()?;
    Some(sign * i64::try_from(span.as_micros()).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instants_are_shown_as_row_to_json_shows_them() {
        let cases = [
            (Form::TimestampTz, "2000-01-01 00:00:00+00", 0, "2000-01-01T00:00:00+00:00"),
            (Form::TimestampTz, "2000-01-01 01:30:00.5+01:30", 500_000, "2000-01-01T00:00:00.5+00:00"),
            (Form::TimestampTz, "1999-12-31T23:59:59.000001Z", -999_999, "1999-12-31T23:59:59.000001+00:00"),
            (Form::Timestamp, "2000-02-29 12:00:00", 59 * DAY_US + DAY_US / 2, "2000-02-29T12:00:00"),
            (Form::Date, "2001-01-01", 366 * DAY_US, "2001-01-01"),
            (Form::Date, "infinity", i64::MAX, "infinity"),
            (Form::Timestamp, "-infinity", i64::MIN, "-infinity"),
            (Form::Date, "0044-03-15 BC", -746_117 * DAY_US, "0044-03-15 BC"),
            (
                Form::TimestampTz,
                "294276-12-31 23:59:59.999999+00",
                9_223_371_331_199_999_999,
                "294276-12-31T23:59:59.999999+00:00",
            ),
        ];
        for (form, text, us, shown) in cases {
            let instant = Instant::parse(text, form);
            assert_eq!(instant.map(|instant| instant.us), Some(us), "{text}");
            assert_eq!(instant.map(|instant| instant.to_string()).as_deref(), Some(shown), "{text}");
        }
    }

    #[test]
    fn what_is_no_instant_is_refused() {
        for text in [
            "",
            "now",
            "2024",
            "2024-1-1",
            "2024-02-30",
            "2023-02-29",
            "24-01-01",
            "2024-13-01",
            "0000-01-01",
            "2024-01-01 ",
            "2024-01-01T25:00:00",
            "2024-01-01T00:00:00+0",
            "2024-01-01T00:00:00+00:00:00:00",
            "2024-01-01-01",
            "é024-01-01",
            "2024-01-01 00:00:00é",
            "9999999999999999999-01-01",
        ] {
            assert_eq!(Instant::parse(text, Form::Timestamp), None, "{text}");
        }
    }

    #[test]
    fn spans() {
        for (text, us) in [("1h30m", 5_400_000_000), ("-5m", -300_000_000), ("250ms", 250_000), ("1d", DAY_US)] {
            assert_eq!(parse_span(text), Some(us), "{text}");
        }
        for text in ["", "5", "h", "1 century", "--1h", "99999999999999999999h"] {
            assert_eq!(parse_span(text), None, "{text}");
        }
    }
}
