//! Which known name was probably meant, for messages about names that do not exist.

/// The share of its letters that a name may have wrong and still be meant.
const TOLERANCE: f64 = 0.4;

/// The candidate that is closest to `name`, if one is close enough: nearly the same letters, or one begins with the
/// other. Of equals it is the first.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let folded = name.trim().to_lowercase();
    let distances = candidates.into_iter().map(|candidate| {
        let distance = strsim::damerau_levenshtein(&folded, &candidate.to_lowercase());
        (distance, candidate)
    });
    let (distance, candidate) = distances.min_by_key(|(distance, _)| *distance)?;
    let found = candidate.to_lowercase();
    let letters = folded.chars().count().max(found.chars().count());
    let begins = !folded.is_empty() && (found.starts_with(&folded) || folded.starts_with(&found));
    (begins || distance as f64 <= TOLERANCE * letters as f64).then_some(candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn near_misses_are_found_and_far_ones_are_not() {
        let columns = ["id", "name", "category_id", "Price"];
        let cases = [
            ("category", Some("category_id")),
            ("names_of_products", Some("name")),
            ("catgeory_id", Some("category_id")),
            ("categoryId", Some("category_id")),
            ("price", Some("Price")),
            (" id ", Some("id")),
            ("weight", None),
            ("weight_in_kilograms", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(nearest(name, columns), expected, "{name}");
        }
        assert_eq!(nearest("id", []), None);
    }
}
