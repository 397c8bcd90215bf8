//! A value's text form → JSON, byte for byte as `row_to_json` gives it.
