//! Where changes come from.

pub mod conninfo;
pub mod replication;
pub mod slot;
pub mod tls;
pub mod wire;
