//! Deleting by tag: the members of a set are keys, without the prefix.
//!
//! A set is gone through page by page, so that no step takes long however many members it has. Each step deletes keys and
//! takes their names out of the set at once, or a member that somebody adds again in between would be lost. What a rule's
//! row puts there stays a member: an application that fills the key again need not know of its tags.

use redis::Value;

use super::super::connection::{Connection, Failure};
use super::{SWEEP_STEP_KEYS, Writer, about, types, unexpected};
use crate::batch::{Batch, Members};
use crate::error::{Error, ErrorKind};
use crate::rules::template::RESERVED;

/// Members that a set loses.
pub(super) struct Leaving<'a> {
    /// Its key.
    pub(super) set: &'a [u8],
    /// They.
    pub(super) members: &'a [&'a [u8]],
}

/// Takes members out of a set whose keys are gone, as long as the fence stands.
///
/// KEYS: the fence, the set, and the key of each member. ARGV: the fence, and the members.
const FORGET: &str = "\
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
for i = 3, #KEYS do
  if redis.call('TYPE', KEYS[i]).ok == 'none' then redis.call('SREM', KEYS[2], ARGV[i - 1]) end
end
return 1";

impl Writer {
    /// Deletes these members of tags, which are under `prefix`.
    pub(super) async fn sweep_tags(
        &self,
        connection: &mut Connection,
        prefix: &str,
        tags: &[Vec<u8>],
        going: &Members,
        batch: &Batch,
    ) -> Result<(), Failure> {
        let adds = |tag: &[u8]| {
            let mut added = batch.ops().filter(|(_, op)| op.puts() && op.member().is_some());
            added.any(|(_, op)| op.key()[self.config.prefix.len()..] == tag[prefix.len()..])
        };
        for tags in tags.chunks(SWEEP_STEP_KEYS as usize) {
            for (tag, kind) in tags.iter().zip(types(connection, tags).await?) {
                match kind.as_str() {
                    "set" => self.sweep_tag(connection, prefix, tag, going).await?,
                    "none" => {}
                    // What is no set has no members; where the tag is to go, it goes. Where some are added, EXEC finds what it
                    // is, and the rule makes up for all others.
                    _ if *going == Members::All && !adds(tag) => {
                        self.guarded(connection, &[tag], self.stored.as_ref()).await?
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    async fn sweep_tag(
        &self,
        connection: &mut Connection,
        prefix: &str,
        tag: &[u8],
        going: &Members,
    ) -> Result<(), Failure> {
        let mut cursor = b"0".to_vec();
        loop {
            let (next, members) = page(connection, tag, &cursor).await?;
            self.sweep_members(connection, prefix, tag, &members, going).await?;
            if next == b"0" {
                return Ok(());
            }
            cursor = next;
        }
    }

    async fn sweep_members(
        &self,
        connection: &mut Connection,
        prefix: &str,
        tag: &[u8],
        members: &[Vec<u8>],
        going: &Members,
    ) -> Result<(), Failure> {
        let under = |prefix: &str, bare: &[u8]| [prefix.as_bytes(), bare].concat();
        let main = |bare: &[u8]| under(&self.config.prefix, bare);
        let main_tag = main(&tag[prefix.len()..]);
        let members = members.iter().map(Vec::as_slice);
        match going {
            Members::All => {
                let keys: Vec<_> =
                    members.clone().filter(|bare| !self.is_kept(&main(bare))).map(|bare| under(prefix, bare)).collect();
                let leaving: Vec<_> = members.filter(|bare| !self.is_registered(&main_tag, &main(bare))).collect();
                self.let_go(connection, &keys, tag, &leaving).await
            }
            Members::Registered(of_rule) => {
                let leaving: Vec<_> = members.filter(|bare| of_rule.matches(&main(bare))).collect();
                self.let_go(connection, &[], tag, &leaving).await
            }
            Members::Stale => {
                let others: Vec<_> = members.filter(|bare| !self.is_registered(&main_tag, &main(bare))).collect();
                let keys: Vec<_> = others.iter().map(|bare| under(prefix, bare)).collect();
                self.forget(connection, tag, &others, &keys).await
            }
        }
    }

    /// Whether no tag takes this key of the main prefix with it: keepstep's own, and those that a rule must hold.
    fn is_kept(&self, key: &[u8]) -> bool {
        let is_own = key[self.config.prefix.len()..].starts_with(RESERVED.as_bytes());
        is_own || self.tagging.values().any(|rule| rule.kept.iter().any(|kept| kept.matches(key)))
    }

    /// Whether a rule says which tags this key has, as far as can be seen from it.
    fn is_registered(&self, tag: &[u8], key: &[u8]) -> bool {
        let mut registered = self.tagging.values().flat_map(|rule| &rule.registered);
        registered.any(|(tags, keys)| tags.matches(tag) && keys.matches(key))
    }

    async fn let_go(
        &self,
        connection: &mut Connection,
        keys: &[Vec<u8>],
        tag: &[u8],
        members: &[&[u8]],
    ) -> Result<(), Failure> {
        if keys.is_empty() && members.is_empty() {
            return Ok(());
        }
        let leaving = Some(Leaving { set: tag, members }).filter(|leaving| !leaving.members.is_empty());
        self.guarded_from(connection, &self.own_fences(), keys, leaving, self.stored.as_ref()).await
    }

    async fn forget(
        &self,
        connection: &mut Connection,
        tag: &[u8],
        members: &[&[u8]],
        keys: &[Vec<u8>],
    ) -> Result<(), Failure> {
        if members.is_empty() {
            return Ok(());
        }
        let mut script = redis::cmd("EVAL");
        script.arg(FORGET).arg(2 + keys.len()).arg(&self.fence_keys[0]).arg(tag).arg(keys);
        script.arg(&self.fence).arg(members);
        match connection.send_one(script).await? {
            Value::Int(1) => Ok(()),
            Value::Int(_) => Err(Failure::Changed),
            other => Err(unexpected("EVAL", &other)),
        }
    }
}

/// Some members, maybe none, some of them twice, and where to go on.
async fn page(connection: &mut Connection, tag: &[u8], cursor: &[u8]) -> Result<(Vec<u8>, Vec<Vec<u8>>), Failure> {
    let mut scan = about("SSCAN", tag);
    scan.arg(cursor).arg("COUNT").arg(SWEEP_STEP_KEYS);
    redis::from_redis_value(connection.send_one(scan).await?).map_err(|error| {
        let message = "Redis answered SSCAN with something else than a cursor and members";
        Failure::Final(Error::new(ErrorKind::Protocol, message).because(error))
    })
}
