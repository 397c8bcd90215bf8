//! A Postgres URL → what both connections need.
