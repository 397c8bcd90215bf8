//! Change + bound rules → cache operations; pure.
