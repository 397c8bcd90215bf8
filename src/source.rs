//! Where changes come from: one replication connection that streams, and ordinary ones that ask.
//!
//! Both kinds are opened by `connect` from one [`conninfo::ConnInfo`], so hosts, TLS and fall-backs behave the same.

pub mod client;
pub mod conninfo;
pub mod provision;
pub mod replication;
pub mod slot;

mod connect;
mod login;
mod server_error;
mod tls;
mod wire;

pub use server_error::query_error;
