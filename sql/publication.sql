-- What keepstep streams from: a publication of the tables that the rules follow, and a replication slot. The same as
-- `keepstep setup` makes, for whoever prefers to run it by hand. To be run in the application's database by the tables' owner, who
-- needs CREATE on the database and REPLICATION (or by a superuser), once per slot:
--
--   psql -d shop -v tables='public.products, public.orders' -f publication.sql
--
-- -v publication=other and -v slot=other give other names than keepstep. It may be run again, with more tables for example.
--
-- What it costs: from now on Postgres keeps its log until keepstep has read it, so a slot that nobody reads fills the disk.
-- max_slot_wal_keep_size bounds that; teardown.sql ends it.

\set ON_ERROR_STOP on
\if :{?publication}
\else
  \set publication keepstep
\endif
\if :{?slot}
\else
  \set slot keepstep
\endif
\if :{?tables}
\else
  \warn 'name the tables: psql -v tables=\'public.products, public.orders\' -f publication.sql'
  SELECT tables_are_missing;
\endif

-- No statement waits for a lock for long: applications would wait behind it.
SET lock_timeout = '5s';

-- A table without a replica identity must not be published: the application's own UPDATEs and DELETEs on it would fail.
SELECT set_config('keepstep.tables', :'tables', false) \g /dev/null
DO $$
DECLARE
  bare text;
BEGIN
  SELECT string_agg(format('%s', leaf.oid::regclass), ', ') INTO bare
  FROM regexp_split_to_table(current_setting('keepstep.tables'), '\s*,\s*') AS given(name)
  CROSS JOIN LATERAL (SELECT name::regclass::oid WHERE (SELECT relkind FROM pg_class WHERE oid = name::regclass) = 'r'
                      UNION SELECT relid FROM pg_partition_tree(name::regclass) WHERE isleaf) AS leaf(oid)
  JOIN pg_class c ON c.oid = leaf.oid
  WHERE relreplident <> 'f' AND NOT EXISTS (
    SELECT FROM pg_index i
    WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
      AND CASE relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END);
  IF bare IS NOT NULL THEN
    RAISE EXCEPTION 'no replica identity: %', bare
      USING HINT = 'ALTER TABLE ... REPLICA IDENTITY USING INDEX a_unique_index, or FULL, or give it a primary key';
  END IF;
END
$$;

-- The publication comes first: Postgres looks it up as it was at each change, and a slot older than its publication is of no use.
-- Partitions are published under their root's name.
SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = :'publication') AS published \gset
\if :published
  SELECT format('ALTER PUBLICATION %I ADD TABLE %s', :'publication', string_agg(name, ', '))
  FROM regexp_split_to_table(:'tables', '\s*,\s*') AS given(name)
  WHERE NOT EXISTS (SELECT FROM pg_publication p JOIN pg_publication_rel ON prpubid = p.oid
                    WHERE pubname = :'publication' AND prrelid = name::regclass)
  HAVING count(*) > 0 \gexec
\else
  BEGIN;
  CREATE PUBLICATION :"publication" FOR TABLE :tables WITH (publish_via_partition_root = true);
  -- What is noted here is what `keepstep teardown` may drop.
  COMMENT ON PUBLICATION :"publication" IS 'keepstep: publication made by setup';
  COMMIT;
\endif

-- The slot, and a note of where it was made: by it keepstep tells a fresh slot from one whose changes somebody else has read.
SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = :'slot') AS made \gset
\if :made
\else
  SELECT lsn AS born FROM pg_create_logical_replication_slot(:'slot', 'pgoutput') \gset
  SELECT format('COMMENT ON PUBLICATION %I IS %L', :'publication', concat_ws(E'\n',
           (SELECT string_agg(line, E'\n' ORDER BY place)
            FROM pg_publication, unnest(string_to_array(obj_description(oid, 'pg_publication'), E'\n'))
              WITH ORDINALITY AS old(line, place)
            WHERE pubname = :'publication' AND NOT starts_with(line, format('keepstep: slot %s made at ', :'slot'))),
           format('keepstep: slot %s made at %s', :'slot', :'born'))) \gexec
\endif
