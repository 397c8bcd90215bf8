//! The slot and the publication: their state, setup and teardown.
