//! The Redis side.
