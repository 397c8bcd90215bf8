//! The keys that a template can have made, matched by column type.
