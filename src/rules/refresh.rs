//! Keys that hold what a query answers: `[query.NAME]` with `mode = "refresh"`, bound to one of its tables.
//!
//! A change says which keys are stale, by the parameters of the query. What they hold next is Postgres's to say, once
//! whoever reads the tables sees the change ([`crate::query::refresh`]).

use std::sync::Arc;

use hashbrown::HashMap;

use super::key::{BoundKey, Rendered};
use super::pattern::Pattern;
use super::template::Part;
use crate::config::Query;
use crate::model::Datum;

/// How a row comes to the key and the parameters of a query.
#[derive(Clone, Debug)]
pub struct BoundRefresh {
    /// The rule's place in [`crate::config::Config::rules`].
    pub rule: u16,
    /// The query.
    pub query: Arc<Query>,
    /// Its key.
    pub key: BoundKey,
    /// Each of [`Query::parameters`], as a key without a prefix.
    pub parameters: Vec<BoundKey>,
}

impl BoundRefresh {
    /// The key that the row makes stale.
    ///
    /// # Errors
    /// Why it cannot be named.
    pub fn of(&self, row: &[Datum<'_>]) -> Result<Stale, Rendered> {
        let render = |key: &BoundKey| {
            let mut out = Vec::new();
            match key.render(row, &mut out) {
                Rendered::Done => Ok(out.into_boxed_slice()),
                other => Err(other),
            }
        };
        let parameters = self.parameters.iter().map(render).collect::<Result<_, _>>()?;
        Ok(Stale { rule: self.rule, query: Arc::clone(&self.query), key: render(&self.key)?, parameters })
    }
}

/// All keys of a query that there should be.
#[derive(Clone, Debug)]
pub struct KeyListing {
    /// The rule that answers for them.
    pub rule: u16,
    /// The query.
    pub query: Arc<Query>,
    /// What its keys look like.
    pub pattern: Pattern,
}

impl KeyListing {
    /// The key with these parameters; `prefix` is that of `[redis]`.
    pub fn stale(&self, prefix: &str, parameters: Arc<[Box<[u8]>]>) -> Stale {
        let names = self.query.parameters();
        let mut key = prefix.as_bytes().to_vec();
        for part in self.query.key.value.parts() {
            match part {
                Part::Literal(text) => key.extend_from_slice(text.as_bytes()),
                Part::Placeholder(placeholder) => {
                    let start = key.len();
                    let place = names.iter().position(|name| *name == placeholder.name);
                    let value = place.and_then(|place| parameters.get(place));
                    value.into_iter().for_each(|value| key.extend_from_slice(value));
                    placeholder.filters.iter().for_each(|filter| filter.apply(&mut key, start));
                }
            }
        }
        Stale { rule: self.rule, query: Arc::clone(&self.query), key: key.into(), parameters }
    }
}

/// A key that is to be read again.
#[derive(Clone, Debug)]
pub struct Stale {
    /// The rule that says so.
    pub rule: u16,
    /// What it holds.
    pub query: Arc<Query>,
    /// Its name, prefix included.
    pub key: Box<[u8]>,
    /// The value of each of [`Query::parameters`], as text.
    pub parameters: Arc<[Box<[u8]>]>,
}

impl Stale {
    /// How many bytes it holds, about.
    pub fn byte_len(&self) -> usize {
        size_of::<Stale>() + self.key.len() + self.parameters.iter().map(|value| value.len()).sum::<usize>()
    }

    /// The value of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&[u8]> {
        let place = self.query.parameters().iter().position(|known| *known == name)?;
        self.parameters.get(place).map(|value| &**value)
    }
}

/// Stale keys, each once.
#[derive(Debug, Default)]
pub struct StaleKeys {
    keys: HashMap<Box<[u8]>, Stale>,
    bytes: usize,
}

impl StaleKeys {
    /// Adds one.
    pub fn add(&mut self, stale: Stale) {
        if !self.keys.contains_key(&stale.key) {
            self.bytes += stale.byte_len();
            self.keys.insert(stale.key.clone(), stale);
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// How many bytes they hold, about.
    pub fn byte_len(&self) -> usize {
        self.bytes
    }

    /// Each of them, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &Stale> {
        self.keys.values()
    }

    /// Takes all of them out.
    pub fn take(&mut self) -> Vec<Stale> {
        self.bytes = 0;
        self.keys.drain().map(|(_, stale)| stale).collect()
    }
}
