-- The role that keepstep connects as, with no more than it needs. To be run in the application's database by a superuser,
-- or by the administrator of a managed service:
--
--   psql -d shop -v tables='public.products, public.orders' -f role.sql
--
-- The role is called keepstep; -v role=other calls it otherwise. Then give it a password, which psql sends encrypted:
--
--   psql -d shop -c '\password keepstep'
--
-- With -v source=outbox it gets no REPLICATION, and reads the outbox once outbox.sql has been run for it.
--
-- It may be run again, with more tables for example. Nothing is ever taken away; teardown.sql does that.

\set ON_ERROR_STOP on
\if :{?role}
\else
  \set role keepstep
\endif
\if :{?source}
\else
  \set source replication
\endif
\if :{?tables}
\else
  \warn 'name the tables: psql -v tables=\'public.products, public.orders\' -f role.sql'
  SELECT tables_are_missing;
\endif

-- A login. The connection limit leaves room for one daemon and its successor: a replication connection and two for queries each.
SELECT format('CREATE ROLE %I LOGIN CONNECTION LIMIT 8', :'role')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role') \gexec

-- REPLICATION, to stream the changes of a slot. What it costs: such a role can also copy the whole cluster by physical
-- replication (pg_basebackup), unless pg_hba.conf forbids that with a line before those that let it in:
--   host  replication  keepstep  all  reject
-- Logical replication is not meant by that line: it is matched by the database's name.
-- Amazon RDS and Aurora give this right by membership in rds_replication.
SELECT CASE WHEN EXISTS (SELECT FROM pg_roles WHERE rolname = 'rds_replication')
            THEN format('GRANT rds_replication TO %I', :'role')
            ELSE format('ALTER ROLE %I REPLICATION', :'role') END
WHERE :'source' <> 'outbox' \gexec

-- CONNECT and USAGE, to get at the tables at all. What they cost: nothing that PUBLIC does not have by default.
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'role') \gexec

SELECT DISTINCT format('GRANT USAGE ON SCHEMA %I TO %I', nspname, :'role')
FROM regexp_split_to_table(:'tables', '\s*,\s*') AS given(name)
JOIN pg_class c ON c.oid = name::regclass JOIN pg_namespace n ON n.oid = relnamespace \gexec

-- SELECT, to read rows that the stream does not carry whole. What it costs: keepstep sees every column of these tables, as it
-- does in the stream already. Where row security applies to the role, reading fails instead of leaving rows out;
-- ALTER ROLE keepstep BYPASSRLS (a superuser's right) ends that.
SELECT format('GRANT SELECT ON TABLE %I.%I TO %I', nspname, relname, :'role')
FROM regexp_split_to_table(:'tables', '\s*,\s*') AS given(name)
JOIN pg_class c ON c.oid = name::regclass JOIN pg_namespace n ON n.oid = relnamespace \gexec
