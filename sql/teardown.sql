-- Drops what publication.sql and role.sql made. To be run in the application's database by the publication's owner with
-- REPLICATION (for the role: by a superuser), after the daemon has ended:
--
--   psql -d shop -f teardown.sql
--
-- -v publication=other and -v slot=other give other names than keepstep; with -v role=keepstep the role goes too. What carries
-- no note of keepstep's in the publication's comment stays. It may be run again.

\set ON_ERROR_STOP on
\if :{?publication}
\else
  \set publication keepstep
\endif
\if :{?slot}
\else
  \set slot keepstep
\endif

SET lock_timeout = '5s';

SELECT EXISTS (SELECT FROM pg_publication, unnest(string_to_array(obj_description(oid, 'pg_publication'), E'\n')) AS line
               WHERE pubname = :'publication' AND starts_with(line, format('keepstep: slot %s made at ', :'slot'))) AS slot_noted,
       EXISTS (SELECT FROM pg_publication, unnest(string_to_array(obj_description(oid, 'pg_publication'), E'\n')) AS line
               WHERE pubname = :'publication' AND line = 'keepstep: publication made by setup') AS publication_noted,
       EXISTS (SELECT FROM pg_publication, unnest(string_to_array(obj_description(oid, 'pg_publication'), E'\n')) AS line
               WHERE pubname = :'publication' AND starts_with(line, 'keepstep: slot ')
                 AND NOT starts_with(line, format('keepstep: slot %s made at ', :'slot'))) AS others_noted \gset

-- Fails while a daemon streams the slot, and names its session.
\if :slot_noted
  SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = :'slot' \g /dev/null
\endif

-- Where other slots use the publication it stays, and only forgets this one.
\if :others_noted
  SELECT format('COMMENT ON PUBLICATION %I IS %L', :'publication', string_agg(line, E'\n' ORDER BY place))
  FROM pg_publication, unnest(string_to_array(obj_description(oid, 'pg_publication'), E'\n')) WITH ORDINALITY AS old(line, place)
  WHERE pubname = :'publication' AND NOT starts_with(line, format('keepstep: slot %s made at ', :'slot')) \gexec
\elif :publication_noted
  DROP PUBLICATION IF EXISTS :"publication";
\endif

-- First what was granted to the role in this database. DROP ROLE refuses while it has rights in another one.
\if :{?role}
  SELECT format('DROP OWNED BY %I', rolname) FROM pg_roles WHERE rolname = :'role' \gexec
  DROP ROLE IF EXISTS :"role";
\endif
