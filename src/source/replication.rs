//! START_REPLICATION: frames in, status updates out.
