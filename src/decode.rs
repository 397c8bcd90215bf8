//! Pure parsers of what Postgres sends: pgoutput messages, and values in text form.

pub mod pgoutput;
pub mod types;
pub mod value;
