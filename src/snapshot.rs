//! Reading tables while the stream goes on, exact without pausing: warm, reconcile, audit and re-read are one mechanism.
//!
//! For each chunk:
//!
//! 1. the session has begun to note which cells the stream touches, and by which transactions ([`touches`]);
//! 2. everything decoded before that is visible ([`visibility`]);
//! 3. in a REPEATABLE READ transaction the leaf is locked, its filenode compared, and a range of its pages read by COPY
//!    ([`reader`], [`copy_text`]);
//! 4. a transactional logical message, the marker, is committed after the snapshot was taken: in the stream it stands
//!    behind every transaction that the snapshot sees;
//! 5. the rendered rows wait until the marker has come out of the stream. Then all that the snapshot sees is applied,
//!    and the chunk can only move a cell forward. Cells that the stream has touched with transactions that the snapshot
//!    does not see are left alone: the stream's own operation is newer.
//!
//! Both tests are needed. Without the marker, the stream would later bring older states back over a newer row. Without
//! visibility, a transaction that was decoded but not yet visible when the chunk was read would be undone.
//!
//! **Architecture invariant:** no value that was read from a table reaches the cache in any other way.

pub mod audit;
pub mod copy_text;
pub mod reader;
pub mod search;
pub mod touches;
pub mod visibility;
