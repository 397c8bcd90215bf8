#![doc = include_str!("ARCHITECTURE.md")]

pub mod cli;
pub mod config;

pub mod model;

pub mod source;

pub mod decode;

pub mod catalog;
pub mod rules;

pub mod plan;

pub mod batch;

pub mod cache;

pub mod snapshot;

pub mod query;

pub mod session;

pub mod admin;
pub mod backoff;
mod canary;
pub mod error;
pub mod metrics;
pub mod sandbox;
pub mod shutdown;
pub mod suggest;
pub mod telemetry;
