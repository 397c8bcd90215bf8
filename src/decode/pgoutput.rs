//! The pgoutput messages of protocol version 1, as slices of the frame they came in.
