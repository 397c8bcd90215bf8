//! The operations that go out together: the last one per cell wins.
