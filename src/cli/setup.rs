//! interim
use std::path::Path;
use std::process::ExitCode;
use anyhow::Result;
#[derive(Debug, clap::Args)]
pub(super) struct SetupArguments {}
#[derive(Debug, clap::Args)]
pub(super) struct TeardownArguments {}
pub(super) fn setup(config: &Path, _: &SetupArguments) -> Result<ExitCode> {
    let config = super::load(config)?;
    super::block_on(async {
        let info = crate::source::conninfo::ConnInfo::from_config(&config.postgres)?;
        let client = crate::source::client::connect(&info, std::time::Duration::from_secs(10)).await?;
        let mut tables: Vec<String> = config.rules.iter().map(|r| crate::catalog::sql_table(&r.table.value)).collect();
        tables.sort(); tables.dedup();
        client.batch_execute(&format!("create publication {} for table {} with (publish_via_partition_root = true)", config.postgres.publication, tables.join(","))).await?;
        let row = client.query_one("select lsn::text from pg_create_logical_replication_slot($1, 'pgoutput')", &[&config.postgres.slot]).await?;
        let lsn: String = row.get(0);
        client.batch_execute(&format!("comment on publication {} is 'keepstep: slot {} made at {}'", config.postgres.publication, config.postgres.slot, lsn)).await?;
        Ok(ExitCode::SUCCESS)
    })?
}
pub(super) fn teardown(_: &Path, _: &TeardownArguments) -> Result<ExitCode> { Ok(ExitCode::SUCCESS) }
