//! Exact decimals: what a `numeric` column, a literal with a point and a JSON number are.
//!
//! They hold 38 digits, which is what 128 bits do, and any scale. What would need more is an error, never a rounded
//! value; only comparing works without a limit. Results have the scale that Postgres gives them: that of the finer
//! operand for a sum, both together for a product.

use std::cmp::Ordering;
use std::fmt;

use super::EvalError;

/// `digits` × 10^-`scale`. Equal numbers may be of different scales: [`Decimal::compare`] them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Decimal {
    digits: i128,
    scale: u32,
}

/// The finest scale of a `numeric` (`NUMERIC_MAX_RESULT_SCALE` lies below it), so that no exponent makes a text of
/// gigabytes.
const SCALE_MAX: u32 = 16_383;

/// So many decimal digits always fit into 64 bits.
const CHUNK: usize = 18;

impl Decimal {
    /// Reads `-12.50`, `.5` or `1.5e-7`.
    pub(super) fn parse(text: &[u8]) -> Result<Self, EvalError> {
        Self::parse_short(text).map_or_else(|| Self::parse_any(text), Ok)
    }

    /// In one pass, where the digits surely fit into 64 bits, as most do; `None` is for [`Self::parse_any`] to tell.
    fn parse_short(text: &[u8]) -> Option<Self> {
        let (negative, unsigned) = match text {
            [b'-', rest @ ..] => (true, rest),
            _ => (false, text),
        };
        if unsigned.len() > CHUNK {
            return None;
        }
        let (mut digits, mut point) = (0_i64, None);
        for (at, byte) in unsigned.iter().enumerate() {
            match byte {
                b'0'..=b'9' => digits = digits * 10 + i64::from(byte - b'0'),
                b'.' if point.is_none() => point = Some(at),
                _ => return None,
            }
        }
        let scale = point.map_or(0, |at| unsigned.len() - at - 1);
        let some_digits = unsigned.len() > usize::from(point.is_some());
        let digits = i128::from(if negative { -digits } else { digits });
        some_digits.then_some(Decimal { digits, scale: scale as u32 })
    }

    fn parse_any(text: &[u8]) -> Result<Self, EvalError> {
        const MALFORMED: EvalError = EvalError::Malformed("a number");
        let (mantissa, exponent) = match text.iter().position(|byte| matches!(byte, b'e' | b'E')) {
            Some(at) => (&text[..at], parse_exponent(&text[at + 1..]).ok_or(MALFORMED)?),
            None => (text, 0),
        };
        let (negative, unsigned) = match mantissa {
            [b'-', rest @ ..] => (true, rest),
            _ => (false, mantissa),
        };
        let point = unsigned.iter().position(|&byte| byte == b'.');
        let (whole, fraction) = match point {
            Some(at) => (&unsigned[..at], &unsigned[at + 1..]),
            None => (unsigned, &[][..]),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(MALFORMED);
        }
        let mut digits = 0_i128;
        for chunk in whole.chunks(CHUNK).chain(fraction.chunks(CHUNK)) {
            let mut part = 0_u64;
            for byte in chunk {
                let digit = byte.wrapping_sub(b'0');
                if digit > 9 {
                    return Err(MALFORMED);
                }
                part = part * 10 + u64::from(digit);
            }
            let shifted = digits.checked_mul(i128::from(10_u64.pow(chunk.len() as u32)));
            digits = shifted.and_then(|digits| digits.checked_add(part.into())).ok_or(EvalError::TooManyDigits)?;
        }
        let digits = if negative { -digits } else { digits };
        Self::scaled(digits, i64::try_from(fraction.len()).unwrap_or(i64::MAX).saturating_sub(exponent))
    }

    /// `digits` × 10^-`scale`, where the scale may be negative.
    fn scaled(digits: i128, scale: i64) -> Result<Self, EvalError> {
        if digits == 0 {
            return Ok(Decimal { digits, scale: u32::try_from(scale).unwrap_or(0).min(SCALE_MAX) });
        }
        match u32::try_from(scale) {
            Ok(scale) if scale <= SCALE_MAX => Ok(Decimal { digits, scale }),
            Ok(_) => Err(EvalError::TooManyDigits),
            Err(_) => {
                let zeros = u32::try_from(scale.unsigned_abs()).map_err(|_| EvalError::TooManyDigits)?;
                let digits = power_of_ten(zeros).and_then(|power| digits.checked_mul(power));
                digits.map(|digits| Decimal { digits, scale: 0 }).ok_or(EvalError::TooManyDigits)
            }
        }
    }

    /// Microseconds as seconds, without zeros at the end.
    pub(super) fn seconds(us: i64) -> Self {
        let mut seconds = Decimal { digits: us.into(), scale: 6 };
        while seconds.scale > 0 && seconds.digits % 10 == 0 {
            seconds = Decimal { digits: seconds.digits / 10, scale: seconds.scale - 1 };
        }
        seconds
    }

    /// The digits at a scale that is no coarser.
    fn at_scale(self, scale: u32) -> Option<i128> {
        if self.digits == 0 {
            return Some(0);
        }
        let power = power_of_ten(scale.checked_sub(self.scale)?)?;
        // Two of 64 bits always fit, and asking whether two of 128 do takes as long as reading a number.
        match (i64::try_from(self.digits), i64::try_from(power)) {
            (Ok(digits), Ok(power)) => Some(i128::from(digits) * i128::from(power)),
            _ => self.digits.checked_mul(power),
        }
    }

    pub(super) fn compare(self, other: Self) -> Ordering {
        if self.scale == other.scale {
            return self.digits.cmp(&other.digits);
        }
        let scale = self.scale.max(other.scale);
        match (self.at_scale(scale), other.at_scale(scale)) {
            (Some(left), Some(right)) => left.cmp(&right),
            // What does not fit at the other's scale is farther from zero than anything that does; only one side is
            // brought to another scale.
            (None, _) => self.digits.cmp(&0),
            (_, None) => 0.cmp(&other.digits),
        }
    }

    pub(super) fn add(self, other: Self) -> Result<Self, EvalError> {
        let scale = self.scale.max(other.scale);
        let sum = self.at_scale(scale).zip(other.at_scale(scale)).and_then(|(left, right)| left.checked_add(right));
        sum.map(|digits| Decimal { digits, scale }).ok_or(EvalError::TooManyDigits)
    }

    pub(super) fn multiply(self, other: Self) -> Result<Self, EvalError> {
        let digits = self.digits.checked_mul(other.digits).ok_or(EvalError::TooManyDigits)?;
        Self::scaled(digits, i64::from(self.scale) + i64::from(other.scale))
    }

    pub(super) fn negate(self) -> Result<Self, EvalError> {
        let digits = self.digits.checked_neg().ok_or(EvalError::TooManyDigits)?;
        Ok(Decimal { digits, ..self })
    }

    /// What stands before the point.
    pub(super) fn truncate(self) -> Result<i64, EvalError> {
        let whole = power_of_ten(self.scale).map_or(0, |power| self.digits / power);
        i64::try_from(whole).map_err(|_| EvalError::Overflow)
    }

    /// The nearest float.
    pub(super) fn to_f64(self) -> f64 {
        // The standard library rounds correctly, which dividing by a power of ten would not.
        self.to_string().parse().unwrap_or(f64::NAN)
    }
}

/// Those that fit.
const POWERS_OF_TEN: [i128; 39] = {
    let mut powers = [1; 39];
    let mut exponent = 1;
    while exponent < powers.len() {
        powers[exponent] = powers[exponent - 1] * 10;
        exponent += 1;
    }
    powers
};

fn power_of_ten(exponent: u32) -> Option<i128> {
    POWERS_OF_TEN.get(usize::try_from(exponent).ok()?).copied()
}

/// `+7`, `-7`, `7`
fn parse_exponent(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse::<i32>().ok().map(i64::from)
}

impl From<i64> for Decimal {
    fn from(integer: i64) -> Self {
        Decimal { digits: integer.into(), scale: 0 }
    }
}

impl fmt::Display for Decimal {
    /// As `numeric_out` writes it: every digit of its scale, and no exponent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.digits < 0 { "-" } else { "" };
        let scale = self.scale as usize;
        let digits = format!("{:0>width$}", self.digits.unsigned_abs(), width = scale + 1);
        let (whole, fraction) = digits.split_at(digits.len() - scale);
        let point = if scale > 0 { "." } else { "" };
        write!(f, "{sign}{whole}{point}{fraction}")
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn decimal(text: &str) -> Decimal {
        Decimal::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn decimals_are_written_as_they_were_read() {
        for text in
            ["0", "0.00", "-1.50", "12345678901234567890.12345678", "-0.001", "99999999999999999999999999999999999999"]
        {
            assert_eq!(decimal(text).to_string(), text);
        }
        for (text, shown) in [(".5", "0.5"), ("1e3", "1000"), ("1.5E-3", "0.0015"), ("-2.50e1", "-25.0"), ("0e9", "0")]
        {
            assert_eq!(decimal(text).to_string(), shown, "{text}");
        }
        for text in ["", "-", ".", "1.2.3", "1e", "e5", "0x1", "NaN", " 1", "1 ", "+1", "--1"] {
            assert_eq!(Decimal::parse(text.as_bytes()), Err(EvalError::Malformed("a number")), "{text}");
        }
        for text in ["999999999999999999999999999999999999999", "1e39", "1e2000000000", "1e-20000"] {
            assert_eq!(Decimal::parse(text.as_bytes()), Err(EvalError::TooManyDigits), "{text}");
        }
    }

    #[test]
    fn both_ways_to_read_agree() {
        let short = ["0", "-0.10", ".5", "5.", "999999999999999999", "-12345.678900", "0000000000000000.1"];
        for text in short {
            assert_eq!(
                Decimal::parse_short(text.as_bytes()),
                Some(Decimal::parse_any(text.as_bytes()).unwrap()),
                "{text}"
            );
        }
        for text in [".", "-", "", "1.2.3", "1e5", "9999999999999999999", "x"] {
            assert_eq!(Decimal::parse_short(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn they_compare_whatever_their_scales() {
        let ascending =
            ["-1e30", "-2", "-1.5", "-1e-300", "0", "1e-300", "0.1", "0.10000000000000000000000000000000001", "1e30"];
        for (place, left) in ascending.iter().enumerate() {
            for (other, right) in ascending.iter().enumerate() {
                assert_eq!(decimal(left).compare(decimal(right)), place.cmp(&other), "{left} {right}");
            }
        }
        assert_eq!(decimal("1.50").compare(decimal("1.5")), Ordering::Equal);
    }

    #[test]
    fn sums_and_products_are_exact_or_an_error() {
        assert_eq!(decimal("0.1").add(decimal("0.2")).unwrap().to_string(), "0.3");
        assert_eq!(decimal("1.10").add(decimal("-1.1")).unwrap().to_string(), "0.00");
        assert_eq!(decimal("19.99").multiply(decimal("3")).unwrap().to_string(), "59.97");
        assert_eq!(decimal("1.10").multiply(decimal("1.10")).unwrap().to_string(), "1.2100");
        let wide = decimal("99999999999999999999999999999999999999");
        assert_eq!(wide.add(decimal("0.1")), Err(EvalError::TooManyDigits));
        assert_eq!(wide.multiply(wide), Err(EvalError::TooManyDigits));
        assert_eq!(decimal("-7.9").truncate(), Ok(-7));
        assert_eq!(decimal("1e-300").truncate(), Ok(0));
        assert_eq!(wide.truncate(), Err(EvalError::Overflow));
        assert_eq!(decimal("0.1").to_f64().to_bits(), 0.1_f64.to_bits());
    }
}
