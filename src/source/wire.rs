//! The replication connection: start-up, authentication, simple queries, CopyBoth.
