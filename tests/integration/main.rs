//! Everything that needs real servers, in one binary: it links once, and its tests share the harness.
#![expect(clippy::unwrap_used, reason = "a test ends at what it did not expect")]

#[path = "../support/mod.rs"]
mod support;

mod again;
mod cases;
mod catalog;
mod checkpoint;
mod codes;
mod commands;
mod corpus;
mod faults;
mod gaps;
mod harness;
mod heals;
mod holes;
mod init;
mod kinds;
mod large;
mod lookup;
mod orders;
mod outbox;
mod outbox_sql;
mod owned;
mod pgbench;
mod provision;
mod reader;
mod recipes;
mod redis_side;
mod refresh;
mod rejson;
mod source;
mod source_tls;
mod steps;
mod tags;
mod tenants;
mod tidy;
mod told;
mod tutorial;
mod uncarried;
mod values;
mod verify;
