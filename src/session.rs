//! The one loop that drives everything.
