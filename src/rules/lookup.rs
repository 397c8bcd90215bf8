//! Keys that need columns of other tables: a rule's `lookup`, bound to its table.
//!
//! What the log says of a row is not enough to name such a key; SQL has to say the rest, once whoever reads the tables sees
//! the change. Until then only a question is kept: the values of the row that the SQL and the templates need. Equal
//! questions are one, however many changes ask them.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::glob::BoundMatch;
use super::key::BoundKey;
use super::pattern::Pattern;
use super::refresh::BoundRefresh;
use super::sql::Sql;
use crate::config::Spanned;
use crate::model::{Datum, Lsn};

/// A `lookup`, ready for the rows of one relation.
#[derive(Clone, Debug)]
pub struct BoundLookup {
    /// Its rule's place in [`crate::config::Config::rules`].
    pub rule: u16,
    /// The query.
    pub sql: Spanned<Sql>,
    /// The place in the row of each of [`Sql::parameters`], and the OID of its type.
    pub parameters: Vec<(usize, u32)>,
    /// The columns of the result that the templates use, and where they do so first.
    pub names: Vec<Spanned<String>>,
    /// The places of the row's columns that query and templates need, in ascending order.
    pub row: Vec<usize>,
    /// Whether all of these are in the replica identity.
    pub in_identity: bool,
    /// How many columns the row has; in the templates those of the result stand behind them.
    pub width: usize,
    /// How many rows of the result count. With more, everything that the templates can have made goes.
    pub rows_max: usize,
    /// Keys that go, or are refreshed.
    pub delete: Vec<BoundKey>,
    /// The keys that are named are refreshed instead.
    pub refresh: Option<Arc<BoundRefresh>>,
    /// Keys that match go.
    pub delete_match: Vec<BoundMatch>,
    /// Tags that go with their keys.
    pub delete_tags: Vec<BoundKey>,
    /// Keys that get a new generation.
    pub bump: Vec<BoundKey>,
}

impl BoundLookup {
    /// What has to be asked about the row; `None` if the log does not carry all that is needed.
    pub fn values(&self, row: &[Datum<'_>]) -> Option<Values> {
        let value = |place: &usize| match row.get(*place)? {
            Datum::Text(text) => Some(Some((*text).into())),
            Datum::Null => Some(None),
            Datum::UnchangedToast => None,
        };
        self.row.iter().map(value).collect()
    }

    /// Everything that its templates can have made, tags apart.
    pub fn patterns(&self) -> impl Iterator<Item = &Pattern> {
        let keys = self.delete.iter().chain(&self.bump).map(|key| &key.pattern);
        keys.chain(self.delete_match.iter().map(|matching| &matching.pattern))
    }
}

/// The values of [`BoundLookup::row`], in this order; `None` is NULL.
pub type Values = Box<[Option<Box<[u8]>>]>;

/// What has to be looked up.
#[derive(Clone, Debug)]
pub struct Question {
    /// How.
    pub lookup: Arc<BoundLookup>,
    /// For which row.
    pub values: Values,
    /// The newest transaction that questions: the history that it belongs to, and where its commit record begins.
    pub generation: (u64, Lsn),
}

impl Question {
    /// The value of each parameter of the query.
    pub fn parameters(&self) -> impl Iterator<Item = Option<&[u8]>> {
        self.lookup.parameters.iter().map(|(place, _)| self.value(*place))
    }

    fn value(&self, place: usize) -> Option<&[u8]> {
        let at = self.lookup.row.binary_search(&place).ok()?;
        self.values.get(at)?.as_deref()
    }

    /// The row as the templates want it, with a row of the result behind it; what was not asked for is not known.
    pub fn row<'r>(&'r self, found: &[Option<&'r str>]) -> Vec<Datum<'r>> {
        let mut row = vec![Datum::UnchangedToast; self.lookup.width];
        for (place, value) in self.lookup.row.iter().zip(&self.values) {
            row[*place] = value.as_deref().map_or(Datum::Null, Datum::Text);
        }
        row.extend(found.iter().map(|value| value.map_or(Datum::Null, |text| Datum::Text(text.as_bytes()))));
        row
    }

    fn is_same(&self, other: &Question) -> bool {
        Arc::ptr_eq(&self.lookup, &other.lookup) && self.values == other.values
    }
}

/// Questions, each once, in the order in which they were first asked.
#[derive(Debug, Default)]
pub struct Questions {
    questions: Vec<Question>,
    places: HashTable<usize>,
    hasher: DefaultHashBuilder,
    bytes: usize,
}

impl Questions {
    /// Adds one; if it is there already it is as new as this one.
    pub fn add(&mut self, ask: Question) {
        let (questions, hasher) = (&self.questions, &self.hasher);
        let hash = |ask: &Question| hasher.hash_one((Arc::as_ptr(&ask.lookup), &ask.values));
        let place = self.places.find(hash(&ask), |place| questions[*place].is_same(&ask)).copied();
        match place {
            Some(place) => self.questions[place].generation = ask.generation,
            None => {
                self.places.insert_unique(hash(&ask), questions.len(), |place| hash(&questions[*place]));
                self.bytes +=
                    size_of::<Question>() + ask.values.iter().flatten().map(|value| value.len()).sum::<usize>();
                self.questions.push(ask);
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.questions.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.questions.is_empty()
    }

    /// How many bytes they hold, about.
    pub fn byte_len(&self) -> usize {
        self.bytes
    }

    /// Takes all of them out, the one asked by the oldest transaction first.
    pub fn take(&mut self) -> Vec<Question> {
        self.places.clear();
        self.bytes = 0;
        let mut questions = std::mem::take(&mut self.questions);
        questions.sort_by_key(|ask| ask.generation);
        questions
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn lookup() -> Arc<BoundLookup> {
        let sql = Sql::parse("select code from departments where id = :d and org = :org").expect("a query");
        Arc::new(BoundLookup {
            rule: 0,
            sql: Spanned { value: sql, span: 0..0 },
            parameters: vec![(3, 23), (1, 23)],
            names: vec![Spanned { value: "code".into(), span: 0..0 }],
            row: vec![1, 3],
            in_identity: true,
            width: 4,
            rows_max: 1000,
            delete: Vec::new(),
            refresh: None,
            delete_match: Vec::new(),
            delete_tags: Vec::new(),
            bump: Vec::new(),
        })
    }

    fn ask(lookup: &Arc<BoundLookup>, row: &[Datum<'_>], lsn: u64) -> Option<Question> {
        Some(Question { lookup: Arc::clone(lookup), values: lookup.values(row)?, generation: (1, Lsn(lsn)) })
    }

    /// A question that nothing follows from.
    pub(crate) fn question(lsn: u64) -> Question {
        ask(&lookup(), &ROW, lsn).expect("everything is known")
    }

    const ROW: [Datum<'_>; 4] = [Datum::Text(b"x"), Datum::Text(b"org"), Datum::UnchangedToast, Datum::Null];

    #[test]
    fn a_question_holds_what_query_and_templates_need() {
        let lookup = lookup();
        let asked = ask(&lookup, &ROW, 1).expect("everything is known");
        assert_eq!(asked.parameters().collect::<Vec<_>>(), [None, Some(&b"org"[..])]);
        let row = [Datum::UnchangedToast, Datum::Text(b"org"), Datum::UnchangedToast, Datum::Null, Datum::Text(b"it")];
        assert_eq!(asked.row(&[Some("it")]), row);
        assert!(ask(&lookup, &[Datum::UnchangedToast; 4], 1).is_none());
    }

    #[test]
    fn equal_questions_are_one_as_new_as_the_newest() {
        let (lookup, other) = (lookup(), lookup());
        let mut questions = Questions::default();
        let changed = [Datum::Null; 4];
        for (lookup, row, lsn) in [(&lookup, &ROW, 1), (&lookup, &changed, 2), (&lookup, &ROW, 3), (&other, &ROW, 4)] {
            questions.add(ask(lookup, row, lsn).expect("everything is known"));
        }
        assert!(questions.len() == 3 && questions.byte_len() > 6);
        let taken: Vec<u64> = questions.take().iter().map(|ask| ask.generation.1.0).collect();
        assert_eq!(taken, [2, 3, 4]);
        assert!(questions.is_empty() && questions.byte_len() == 0);
    }
}
