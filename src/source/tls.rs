//! TLS by rustls, in libpq's `sslmode`s.
