//! What stands in the way: all of it at once, each with what ends it.

use super::facts::{Facts, Publication, Role, Server, Table, Unidentified};
use super::{Executor, Wanted, identifier, literal, unpublished};
use crate::error::{Error, ErrorKind};
use crate::source::slot::SlotState;

/// The first Postgres whose logical slots can be failed over, and that knows the argument for it.
const FAILOVER_VERSION: i32 = 170_000;

const BY_DBA: &str = "or let the owner do it: `keepstep setup --print` shows the SQL";

/// What stands in the way of setup. All of it, not just the first.
pub(super) fn of_setup(wanted: &Wanted, facts: &Facts, executor: Executor) -> Vec<Error> {
    let mut found = Vec::new();
    let Server { in_recovery, wal_level, slots, slots_max, .. } = &facts.server;
    if *in_recovery {
        found.push(
            denied("this server is a standby, where no publication can be made")
                .hint("let the URL name the primary, or add `target_session_attrs=primary` and list every host"),
        );
    }
    if wal_level != "logical" {
        found.push(
            denied(format!("`wal_level` is `{wal_level}`, and logical decoding needs `logical`"))
                .hint("ALTER SYSTEM SET wal_level = 'logical'; then restart Postgres")
                .hint("Amazon RDS and Aurora: rds.logical_replication = 1 in the parameter group, then reboot")
                .hint(
                    "Google Cloud SQL: cloudsql.logical_decoding = on; Azure: wal_level = logical; both then restart",
                ),
        );
    }
    if facts.slot.is_none() && slots >= slots_max {
        found.push(
            denied(format!("all {slots_max} replication slots are taken"))
                .hint("SELECT slot_name, active, restart_lsn FROM pg_replication_slots; shows which nobody uses")
                .hint("or raise max_replication_slots and restart Postgres"),
        );
    }
    if wanted.failover && facts.server.version < FAILOVER_VERSION {
        found.push(denied("a slot for failover needs Postgres 17 or later"));
    }
    found.extend(facts.slot.as_ref().and_then(|slot| slot_obstacle(wanted, facts, slot)));
    if let Some(publication) = &facts.publication {
        found.extend(publication_obstacles(wanted, facts, publication));
    }
    found.extend(facts.tables.iter().flat_map(|table| of_table(table, &facts.role, executor)));
    found
}

fn slot_obstacle(wanted: &Wanted, facts: &Facts, slot: &SlotState) -> Option<Error> {
    let name = &wanted.slot;
    let drop_it = format!("SELECT pg_drop_replication_slot({});", literal(name));
    if slot.database.as_ref() != Some(&facts.server.database) || slot.plugin.as_deref() != Some("pgoutput") {
        let plugin = slot.plugin.as_deref().unwrap_or("none: it is physical");
        let database = slot.database.as_deref().unwrap_or("none");
        let message = format!("slot `{name}` is somebody else's (plugin {plugin}, database {database})");
        return Some(Error::new(ErrorKind::Identity, message).hint("choose another `slot` in [postgres]"));
    }
    if slot.is_lost() {
        let message = format!("slot `{name}` is lost: Postgres removed log that it had not sent yet");
        return Some(Error::new(ErrorKind::Gap, message).hint(drop_it));
    }
    if facts.publication.is_none() {
        let message = format!("slot `{name}` is older than publication `{}`, which is missing", wanted.publication);
        return Some(
            denied(message)
                .hint("Postgres cannot decode what was written before the publication: make the slot anew")
                .hint(drop_it),
        );
    }
    None
}

fn publication_obstacles(wanted: &Wanted, facts: &Facts, publication: &Publication) -> Vec<Error> {
    let name = identifier(&wanted.publication);
    let partitioned = facts.tables.iter().find(|table| table.kind == Some('p'));
    let mut found = Vec::new();
    if let Some(table) = partitioned.filter(|_| !publication.via_root) {
        found.push(
            denied(format!("publication {name} sends the changes of {} under its partitions' names", table.name))
                .hint(format!("ALTER PUBLICATION {name} SET (publish_via_partition_root = true);")),
        );
    }
    if !publication.all_operations {
        found.push(
            denied(format!("publication {name} leaves out some of INSERT, UPDATE, DELETE and TRUNCATE"))
                .hint(format!("ALTER PUBLICATION {name} SET (publish = 'insert, update, delete, truncate');")),
        );
    }
    found
}

/// What stands in the way of publishing a table.
pub(super) fn of_table(table: &Table, role: &Role, executor: Executor) -> Vec<Error> {
    let Table { name, .. } = table;
    match table.kind {
        None => return vec![config(format!("table {name} does not exist"))],
        Some('r' | 'p') if table.unlogged => {
            return vec![
                config(format!("table {name} is unlogged: Postgres writes no log of its changes"))
                    .hint(format!("ALTER TABLE {name} SET LOGGED;")),
            ];
        }
        Some('r' | 'p') => {}
        Some(_) => return vec![config(format!("{name} is no table: only tables have changes to follow"))],
    }
    if table.published {
        return Vec::new();
    }
    let mut found: Vec<Error> = table.unidentified.iter().map(identity_obstacle).collect();
    if executor == Executor::Role && !table.owned {
        let message = format!("role `{}` does not own table {name}, and only its owner may publish it", role.name);
        found.push(denied(message).hint(BY_DBA));
    }
    found
}

fn identity_obstacle(Unidentified { name, remedy }: &Unidentified) -> Error {
    let message = format!(
        "table {name} has no replica identity: once it is published, the application's own UPDATEs and DELETEs fail"
    );
    let identity = |what: &str| format!("ALTER TABLE {name} REPLICA IDENTITY {what};");
    let error = match remedy {
        Some(remedy) => config(message).hint(identity(remedy)),
        None => config(message).hint("give it a primary key"),
    };
    error.hint(identity("FULL"))
}

fn denied(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::PostgresDenied, message)
}

fn config(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Config, message)
}

/// What the role lacks to execute the plan itself, but for the tables. A DBA who is given the SQL has it.
pub(super) fn missing_privileges(wanted: &Wanted, facts: &Facts) -> Vec<Error> {
    let role = &facts.role.name;
    let mut found = Vec::new();
    if facts.slot.is_none() && !facts.role.may_replicate {
        found.push(
            denied(format!("role `{role}` may not make a replication slot"))
                .hint(format!("ALTER ROLE {} REPLICATION;", identifier(role)))
                .hint(format!("Amazon RDS and Aurora: GRANT rds_replication TO {};", identifier(role))),
        );
    }
    match &facts.publication {
        None if !facts.role.may_create_publication => {
            let database = identifier(&facts.server.database);
            found.push(
                denied(format!("role `{role}` may not make a publication in this database"))
                    .hint(format!("GRANT CREATE ON DATABASE {database} TO {};", identifier(role)))
                    .hint(BY_DBA),
            );
        }
        Some(publication) if !publication.owned && (facts.slot.is_none() || !unpublished(facts).is_empty()) => {
            let message = format!("role `{role}` does not own publication `{}`", wanted.publication);
            found.push(denied(message).hint(BY_DBA));
        }
        _ => {}
    }
    found
}
