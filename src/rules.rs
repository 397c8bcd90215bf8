//! What a rule means for a table: templates, ownership, and the binding of a rule to a relation.

pub mod bind;
pub mod expression;
pub mod filter;
pub mod form;
pub mod glob;
mod key;
pub mod lookup;
pub mod ownership;
pub mod pattern;
mod problem;
pub mod refresh;
pub mod sql;
pub mod template;

#[cfg(test)]
mod tests;
