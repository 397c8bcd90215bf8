//! The metrics: names, handles.
