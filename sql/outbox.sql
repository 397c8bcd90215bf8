-- What keepstep reads where there is no logical decoding: an outbox, a table that triggers fill with what changed. The same
-- as `keepstep setup` makes with `source = "outbox"`, for whoever prefers to run it by hand. To be run in the application's
-- database by a role that has CREATE on it and owns the tables (or by a superuser):
--
--   psql -d shop -v role=keepstep -f outbox.sql
--   psql -d shop -c "SELECT keepstep.follow('public.products', '{id,name,price}')"      for each table of the rules
--
-- and away with it, after the daemon has ended:
--
--   psql -d shop -c "SELECT keepstep.forget(relid) FROM keepstep.tables WHERE is_present" -c "DROP SCHEMA keepstep CASCADE"
--
-- -v schema=other gives another name than keepstep; it is `slot` of the rules file. `role` is what the daemon connects as. It
-- may be run again; rows, and tables that are followed, stay.
--
-- THE INTERFACE
--   state     one row. `confirmed_lsn`: what was drained up to there is in the cache. In a dump that is loaded elsewhere `system` is
--             another server's: then nothing in the outbox counts, and renew() empties it.
--   gate      a sequence, because every writer reads it and nobody may wait for it: the sum of 1 while the second half of the
--             outbox is written to, 2 while the daemon is asleep (whoever writes sends NOTIFY on the channel of the schema's
--             name), 4 while the outbox is full (nothing is written). Set by sleep(), rotate() and reopen().
--   gap       a sequence. Its value changes with each statement that finds the outbox full: what that changed is not written. After a
--             crash of Postgres it can be another one too, because sequences are logged some values ahead: a gap that is none.
--   tables    one row for each shape that a followed table had: its stored columns in order. `is_present` says whether it is
--             the table's shape of now. Rows name the shape, so that an old row is read by the shape of its time.
--   retyped   a view: places in shapes where the table now has another type than it had. What rows have there may be of either.
--   outbox    the rows. Within one transaction, and for one row of a table, the order of `id` is the order of what happened: it is
--             where the write-ahead log ended just before, which costs less than a sequence would. Rows of different
--             transactions can have the same.
--             op    i  inserted: `new`
--                   u  updated: `new`; `old` where the identity changed or all old columns are stored
--                   d  deleted: `old`
--                   t  truncated
--                   m  a message: `old` is its prefix, `new` its text; no shape
--             old, new  a row's text, as ROW(a, b)::text gives it: each column as its own output function writes it with
--                   DateStyle ISO, TimeZone UTC, IntervalStyle postgres, extra_float_digits 1, bytea_output hex. `new` has
--                   the columns of `tables.columns`; `old` has those too where `tables.is_full`, else only those of
--                   `tables.identity`, in that order. NULL is no image.
--             gone  NULL, or places in `tables.columns` (from 1 on) that the table no longer has: what `old` and `new` have in
--                   these places means nothing.
--             doubt NULL, or true: a trigger of the application's changed the same table in the course of this statement. Which came
--                   last is not known here; the row has to be read from the table.
--
-- Not seen: a function that changes the same table, called from inside an UPDATE of it (`UPDATE t SET a = f()`). What a trigger
-- changes is seen.
--
-- WHAT IT COSTS, each statement that writes to a followed table: one INSERT into the outbox with an entry in one index, and one
-- read of `gate`; nothing is locked that others wait for. The first such statement of a session compiles the trigger's function.

\set ON_ERROR_STOP on
\if :{?schema}
\else
  \set schema keepstep
\endif
\if :{?role}
\else
  \set role ''
\endif

BEGIN;

CREATE SCHEMA IF NOT EXISTS :"schema";
SET LOCAL search_path = :"schema", pg_temp;

CREATE TABLE IF NOT EXISTS state (
  one           boolean     PRIMARY KEY DEFAULT true CHECK (one),
  version       int         NOT NULL,
  made_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
  made_lsn      pg_lsn      NOT NULL DEFAULT pg_current_wal_insert_lsn(),
  system        bigint      NOT NULL DEFAULT (pg_control_system()).system_identifier,
  confirmed_lsn pg_lsn      NOT NULL DEFAULT pg_current_wal_insert_lsn(),
  size_limit    bigint      NOT NULL DEFAULT 0
);
COMMENT ON TABLE state IS 'keepstep: what the daemon has read, of which server';

CREATE TABLE IF NOT EXISTS tables (
  shape      int      PRIMARY KEY,
  relid      oid      NOT NULL,
  schema     text     NOT NULL,
  name       text     NOT NULL,
  columns    text[]   NOT NULL,
  types      oid[]    NOT NULL,
  typmods    int[]    NOT NULL,
  identity   text[]   NOT NULL,
  is_full    boolean  NOT NULL,
  by_row     boolean  NOT NULL,
  is_present boolean  NOT NULL DEFAULT true
);
CREATE UNIQUE INDEX IF NOT EXISTS tables_present ON tables (relid) WHERE is_present;
COMMENT ON TABLE tables IS 'keepstep: the tables that are followed, and what of them is stored';

-- Two halves, so that what was read goes by TRUNCATE: nothing is ever deleted row by row, and nothing has to be vacuumed. They are
-- no partitions: each statement that writes to one would compile the partition's constraint.
CREATE TABLE IF NOT EXISTS outbox_0 (
  id    pg_lsn  NOT NULL,
  xid   xid8    NOT NULL,
  shape int,
  op    "char"  NOT NULL,
  doubt boolean,
  gone  smallint[],
  old   text,
  new   text
) WITH (autovacuum_enabled = false);
CREATE TABLE IF NOT EXISTS outbox_1 (LIKE outbox_0) WITH (autovacuum_enabled = false);
CREATE INDEX IF NOT EXISTS outbox_0_xid ON outbox_0 (xid);
CREATE INDEX IF NOT EXISTS outbox_1_xid ON outbox_1 (xid);
CREATE OR REPLACE VIEW outbox AS SELECT * FROM outbox_0 UNION ALL SELECT * FROM outbox_1;
CREATE SEQUENCE IF NOT EXISTS shape;
CREATE SEQUENCE IF NOT EXISTS gap;
CREATE SEQUENCE IF NOT EXISTS gate MINVALUE 0 START 0;
COMMENT ON VIEW outbox IS 'keepstep: what changed';

INSERT INTO state (version) VALUES (1) ON CONFLICT (one) DO UPDATE SET version = excluded.version;

SELECT setval('gate', 0) WHERE NOT EXISTS (SELECT FROM gate WHERE is_called);

CREATE OR REPLACE VIEW retyped AS
  SELECT t.shape, c.place::smallint AS place
  FROM tables t CROSS JOIN unnest(t.columns, t.types) WITH ORDINALITY AS c(name, type, place)
  JOIN pg_attribute a ON a.attrelid = t.relid AND a.attname = c.name AND NOT a.attisdropped AND a.atttypid <> c.type;

-- Whether a column of a followed table is missing: what stands in its place is then of the type `state`. Both are evaluated when a
-- statement is planned, and cost nothing when it runs.
CREATE OR REPLACE FUNCTION gone(state) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
CREATE OR REPLACE FUNCTION gone(anyelement) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';

-- What is stored of a table: these of its columns (NULL is all) and those of its replica identity. `shape` is left open.
CREATE OR REPLACE FUNCTION shape_of(followed regclass, wanted text[]) RETURNS tables
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $shape_of$
  SELECT ROW(NULL, c.oid, n.nspname, c.relname, columns.name, columns.type, columns.typmod, columns.identity,
             c.relreplident = 'f', rows.are_needed, true)::tables
  FROM pg_class c
  JOIN pg_namespace n ON n.oid = c.relnamespace
  CROSS JOIN LATERAL (
    SELECT array_agg(a.attname::text ORDER BY a.attnum) AS name, array_agg(a.atttypid ORDER BY a.attnum) AS type,
           array_agg(a.atttypmod ORDER BY a.attnum) AS typmod,
           coalesce(array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE c.relreplident = 'f' OR is_key), '{}') AS identity
    FROM pg_attribute a
    CROSS JOIN LATERAL (SELECT EXISTS (
      SELECT FROM pg_index i
      WHERE i.indrelid = a.attrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
        AND (c.relreplident = 'd' AND i.indisprimary OR c.relreplident = 'i' AND i.indisreplident))) AS key(is_key)
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
      AND (wanted IS NULL OR a.attname = ANY (wanted) OR is_key)
  ) AS columns
  -- A change is told by statement, and by row where a statement does not say enough: with inheritance a parent's statement changes
  -- rows of its children too; and where foreign keys of one table both delete its rows and change them, Postgres tells of
  -- several statements as if they were one.
  CROSS JOIN LATERAL (SELECT
    c.relkind = 'r' AND NOT c.relispartition AND EXISTS (SELECT FROM pg_inherits WHERE c.oid IN (inhrelid, inhparent))
    OR (SELECT bool_or(confdeltype = 'c') AND bool_or(confdeltype IN ('n', 'd') OR confupdtype IN ('c', 'n', 'd'))
        FROM pg_constraint WHERE conrelid = c.oid AND contype = 'f') IS TRUE) AS rows(are_needed)
  WHERE c.oid = followed
$shape_of$;

CREATE OR REPLACE FUNCTION ops() RETURNS SETOF text
LANGUAGE sql IMMUTABLE AS $$ VALUES ('insert'), ('update'), ('delete'), ('truncate') $$;

-- The name of the function that a table's triggers for INSERT, UPDATE, DELETE or TRUNCATE call.
CREATE OR REPLACE FUNCTION capture_name(followed oid, op text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT format('capture_%s_%s', followed, op) $$;

-- The triggers that a followed table has, and each of its partitions: what is written to a partition itself fires no statement
-- trigger of the table's. TRUNCATE of a partition says nothing of the rest; keepstep sees it in the catalog.
CREATE OR REPLACE FUNCTION triggers_of(followed regclass, by_row boolean)
RETURNS TABLE (relation regclass, op text, name text, clause text, is_there boolean)
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $triggers_of$
  SELECT part.relid, kind.op, wanted.name,
         format('AFTER %s ON %s %s', kind.op, part.relid, CASE WHEN triggers_of.by_row THEN kind.by_row ELSE kind.by_statement END),
         EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                 WHERE t.tgrelid = part.relid AND t.tgname = wanted.name AND t.tgenabled = 'A'
                   AND (t.tgtype & 1 = 1) = (triggers_of.by_row AND kind.op <> 'truncate')
                   AND p.proname = capture_name(followed, kind.op) AND p.pronamespace = current_schema::regnamespace)
  FROM (SELECT followed UNION SELECT relid FROM pg_partition_tree(followed) WHERE NOT triggers_of.by_row) AS part(relid)
  CROSS JOIN (VALUES
    ('insert', 'FOR EACH ROW', 'REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT'),
    ('update', 'FOR EACH ROW', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT'),
    ('delete', 'FOR EACH ROW', 'REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT'),
    ('truncate', 'FOR EACH STATEMENT', 'FOR EACH STATEMENT')) AS kind(op, by_row, by_statement)
  CROSS JOIN LATERAL (SELECT format('%s_%s', current_schema, kind.op)) AS wanted(name)
  WHERE kind.op <> 'truncate' OR part.relid = followed
$triggers_of$;

-- What `follow` would have to do for a table; no row where all is as it should be.
CREATE OR REPLACE FUNCTION findings(followed regclass, wanted text[] DEFAULT NULL) RETURNS SETOF text
LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $findings$
DECLARE
  had tables;
  has tables := shape_of(followed, wanted);
BEGIN
  SELECT * INTO had FROM tables WHERE relid = followed AND is_present;
  IF NOT FOUND THEN
    RETURN NEXT 'it is not followed';
    RETURN;
  END IF;
  has.shape := had.shape;
  IF had IS DISTINCT FROM has THEN
    RETURN NEXT 'its name, its columns, its replica identity or what is wanted of it is no longer what it was';
  ELSIF EXISTS (SELECT FROM ops() AS op WHERE NOT EXISTS (
                  SELECT FROM pg_proc WHERE proname = capture_name(followed, op) AND pronamespace = current_schema::regnamespace
                    AND prosrc = capture_body(has, op))) THEN
    RETURN NEXT 'the functions of its triggers are not those of this version';
  END IF;
  RETURN QUERY SELECT format('trigger %I on %s is missing or not enabled', t.name, t.relation)
    FROM triggers_of(followed, has.by_row) AS t WHERE NOT t.is_there;
END
$findings$;

-- Follows a table, or follows it as it is now. Says whether anything had to be done. The table's owner must call it.
-- What it costs: SHARE ROW EXCLUSIVE on the table, which waits for writers under way and lets no new ones in meanwhile.
CREATE OR REPLACE FUNCTION follow(followed regclass, wanted text[] DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $follow$
DECLARE
  had tables;
  has tables;
  name text;
  missing record;
BEGIN
  IF NOT EXISTS (SELECT FROM findings(followed, wanted)) THEN
    RETURN false;
  END IF;
  -- Nobody writes in between: a row has the shape that its function says.
  EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', followed);
  has := shape_of(followed, wanted);
  SELECT * INTO had FROM tables WHERE relid = followed AND is_present;
  has.shape := had.shape;
  IF had IS DISTINCT FROM has THEN
    UPDATE tables SET is_present = false WHERE relid = followed AND is_present;
    has.shape := nextval('shape');
    INSERT INTO tables SELECT has.*;
  END IF;
  -- Their bodies name the schema of all that they use, of operators too. A search_path fixed by SET would be as safe, and cost each
  -- statement three times as much as reading `gate` does.
  FOR name IN SELECT op FROM ops() AS op LOOP
    EXECUTE format('CREATE OR REPLACE FUNCTION %I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS %L',
                   capture_name(followed, name), capture_body(has, name));
    EXECUTE format('REVOKE ALL ON FUNCTION %I() FROM PUBLIC', capture_name(followed, name));
  END LOOP;
  FOR missing IN SELECT * FROM triggers_of(followed, has.by_row) WHERE NOT is_there LOOP
    EXECUTE format('CREATE OR REPLACE TRIGGER %I %s EXECUTE FUNCTION %I()', missing.name, missing.clause,
                   capture_name(followed, missing.op));
    -- Also for sessions that replicate from elsewhere.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', missing.relation, missing.name);
  END LOOP;
  RETURN true;
END
$follow$;

-- The settings that the text of such values depends on: name, value, and how a session's own is told from it.
CREATE OR REPLACE FUNCTION settings_of(types oid[]) RETURNS TABLE (name text, value text, differs text)
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $settings$
  WITH RECURSIVE part(oid) AS (
    SELECT unnest(types)
    UNION
    SELECT inner_type FROM part JOIN pg_type t ON t.oid = part.oid
    CROSS JOIN LATERAL (
      SELECT t.typbasetype UNION ALL SELECT t.typelem
      UNION ALL SELECT r.rngsubtype FROM pg_range r WHERE t.oid IN (r.rngtypid, r.rngmultitypid)
      UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
    ) AS inner_types(inner_type)
    WHERE inner_type <> 0
  )
  SELECT known.name, known.value, known.differs FROM (VALUES
    ('DateStyle', 'ISO', 'OPERATOR(pg_catalog.!~~) ''ISO%''', '{date,timestamp,timestamptz}'::regtype[]),
    ('TimeZone', 'UTC', 'OPERATOR(pg_catalog.<>) ALL (''{UTC,Etc/UTC,GMT,Etc/GMT}''::pg_catalog.text[])', '{timestamptz}'),
    ('IntervalStyle', 'postgres', 'OPERATOR(pg_catalog.<>) ''postgres''', '{interval}'),
    ('extra_float_digits', '1', 'OPERATOR(pg_catalog.<>) ''1''', '{float4,float8,point,lseg,path,box,polygon,line,circle}'),
    ('bytea_output', 'hex', 'OPERATOR(pg_catalog.<>) ''hex''', '{bytea}')) AS known(name, value, differs, dependent)
  WHERE EXISTS (SELECT FROM part WHERE part.oid = ANY (dependent)
                -- A type of an extension may contain anything.
                OR EXISTS (SELECT FROM pg_type t WHERE t.oid = part.oid AND t.typtype = 'b' AND t.typelem = 0
                           AND t.typnamespace <> 'pg_catalog'::regnamespace))
$settings$;

-- SQL that writes rows to one half; `rest` is what comes behind the first five columns. Each has its column's type and place: so
-- Postgres needs no step between what it reads and what it writes.
CREATE OR REPLACE FUNCTION put(shape int, op "char", doubt text, half int, rest text) RETURNS text
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $put$
  SELECT format('INSERT INTO %I.outbox_%s (id, xid, shape, op, doubt, gone, old, new)
      SELECT pg_catalog.pg_current_wal_insert_lsn(), pg_catalog.pg_current_xact_id(), %s, %L::pg_catalog."char", %s, %s',
                current_schema, half, shape, op, doubt, rest)
$put$;

-- The same for plpgsql and for the half whose turn it is: with a plan that is kept, or planned each time and given values.
CREATE OR REPLACE FUNCTION step(shape int, op "char", rest text, given text DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $step$
  SELECT format('IF gate OPERATOR(pg_catalog.&) 1 OPERATOR(pg_catalog.=) 0 THEN
      %s;
    ELSE
      %s;
    END IF;', string_agg(sql, '') FILTER (WHERE half = 0), string_agg(sql, '') FILTER (WHERE half = 1))
  FROM (VALUES (0), (1)) AS halves(half)
  CROSS JOIN LATERAL (SELECT CASE WHEN given IS NULL THEN put(shape, op, 'doubt', half, rest)
                                  ELSE format('EXECUTE %L USING doubt, %s', put(shape, op, '$1', half, rest), given) END) AS s(sql)
$step$;

-- What the function of one of a table's triggers does. Everything in it has its schema's name, see `follow`.
CREATE OR REPLACE FUNCTION capture_body(shape tables, op text) RETURNS text
LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $body$
DECLARE
  own    text := quote_ident(current_schema) || '.';
  names  text := (SELECT string_agg(quote_ident(name), ', ') FROM unnest(shape.columns) AS name);
  keys   text := CASE WHEN shape.is_full THEN names
                      ELSE (SELECT string_agg(quote_ident(name), ', ') FROM unnest(shape.identity) AS name) END;
  -- A column that is no longer there is looked for one level further out, and found here: so nothing fails.
  nulls  text := (SELECT string_agg(format('NULL::%sstate AS %I', own, name), ', ') FROM unnest(shape.columns) AS name);
  gone   text := (SELECT format('CASE WHEN %s THEN pg_catalog.array_remove(ARRAY[%s], NULL) END',
                                string_agg(format('%sgone(%I)', own, name), ' OR '),
                                string_agg(format('CASE WHEN %sgone(%I) THEN %s::pg_catalog.int2 END', own, name, place), ', '))
                  FROM unnest(shape.columns) WITH ORDINALITY AS c(name, place));
  -- Rows as images, from one of the two tables of a statement's rows, or from the row itself.
  image  text := format('(SELECT image.* FROM (SELECT %s) AS missing, LATERAL (
      SELECT ROW(%s) AS key, ROW(%s)::pg_catalog.text AS whole, %s AS gone FROM ', nulls, keys, names, gone);
  olds   text := image || CASE WHEN shape.by_row THEN '(SELECT ($2).*) AS r) AS image)' ELSE 'old_rows) AS image)' END;
  news   text := image || CASE WHEN shape.by_row THEN '(SELECT ($3).*) AS r) AS image)' ELSE 'new_rows) AS image)' END;
  -- The old key, if it is not the new one, byte by byte: equal values can have different texts.
  before text := CASE WHEN shape.is_full THEN 'o.key::pg_catalog.text'
                      WHEN shape.identity = '{}' THEN 'NULL::pg_catalog.text'
                      ELSE 'CASE WHEN o.key OPERATOR(pg_catalog.*<>) n.key THEN o.key::pg_catalog.text END' END;
  -- A second row, if there is one: then an old row has to be told from another. Asked in the statement that writes, because to
  -- ask by itself is a statement more.
  lone   text := CASE WHEN shape.by_row THEN '' ELSE ' WHERE NOT EXISTS (SELECT FROM new_rows OFFSET 1)' END;
  inserted text := step(shape.shape, 'i', format('n.gone, NULL::pg_catalog.text, n.whole FROM %s AS n', news),
                        CASE WHEN shape.by_row THEN 'NULL::pg_catalog.text, NEW' END);
  deleted  text := CASE WHEN shape.identity = '{}' THEN 'NULL;'
                        ELSE step(shape.shape, 'd', format('o.gone, o.key::pg_catalog.text, NULL::pg_catalog.text FROM %s AS o', olds),
                                  CASE WHEN shape.by_row THEN 'OLD' END) END;
  updated  text := step(shape.shape, 'u', format('n.gone, %s, n.whole FROM %s AS o, %s AS n%s', before, olds, news, lone),
                        CASE WHEN shape.by_row THEN 'OLD, NEW' END);
  -- Old and new rows come in the same order. A full join, because none of its plans takes the square of the rows.
  paired   text := step(shape.shape, 'u', format('pair.gone, pair.old, pair.whole FROM (
      SELECT %s AS old, n.whole, n.gone
      FROM (SELECT pg_catalog.row_number() OVER () AS place, o.* FROM %s AS o) AS o
      FULL JOIN (SELECT pg_catalog.row_number() OVER () AS place, n.* FROM %s AS n) AS n ON o.place OPERATOR(pg_catalog.=) n.place
      ORDER BY n.place) AS pair', before, olds, news));
  parted boolean := EXISTS (SELECT FROM pg_partition_tree(shape.relid) WHERE NOT isleaf);
  settings record;
BEGIN
  IF parted THEN
    -- A trigger can drop a row on its way to another partition. Then nothing says which rows belong together.
    updated := format('IF (SELECT pg_catalog.count(*) FROM old_rows) OPERATOR(pg_catalog.<>) (SELECT pg_catalog.count(*) FROM new_rows) THEN
      %s
      %s
      RETURN NULL;
    END IF;
    %s', deleted, inserted, updated);
  END IF;
  SELECT string_agg(format('pg_catalog.current_setting(%L) %s', name, differs), ' OR ') AS differ,
         string_agg(format('pg_catalog.current_setting(%L)', name), ', ') AS had,
         string_agg(format('ignored := pg_catalog.set_config(%L, %L, true);', name, value), ' ') AS made,
         string_agg(format('ignored := pg_catalog.set_config(%L, had[%s], true);', name, place), ' ') AS restored
    INTO settings
    FROM settings_of(shape.types) WITH ORDINALITY AS s(name, value, differs, place);
  -- Whether anything is out of the ordinary is found out in one expression, because each is made ready anew in each transaction: the
  -- gate, or 8.
  RETURN format($$
#variable_conflict use_column
DECLARE
  gate pg_catalog.int8 := CASE WHEN pg_catalog.pg_trigger_depth() OPERATOR(pg_catalog.>) 1
         OR pg_catalog.current_setting('keepstep.depth_%3$s', true) OPERATOR(pg_catalog.<>) ''
         OR %4$s OR %5$s OR pg_catalog.random() OPERATOR(pg_catalog.<) 0.001
    THEN 8 ELSE pg_catalog.pg_sequence_last_value(%1$L) END;
  is_odd pg_catalog.bool := gate OPERATOR(pg_catalog.>) 1;
  doubt pg_catalog.bool;
  had pg_catalog.text[];
  ignored pg_catalog.text;
  written pg_catalog.int8;
BEGIN
  IF is_odd THEN
    gate := pg_catalog.pg_sequence_last_value(%1$L);
    IF %5$s THEN
      RETURN NULL;
    END IF;
    IF gate OPERATOR(pg_catalog.&) 4 OPERATOR(pg_catalog.<>) 0 THEN
      PERFORM pg_catalog.nextval(%2$L);
      RETURN NULL;
    END IF;
    IF gate OPERATOR(pg_catalog.&) 2 OPERATOR(pg_catalog.<>) 0 THEN
      PERFORM pg_catalog.pg_notify(%6$L, '');
    END IF;
    IF pg_catalog.pg_trigger_depth() OPERATOR(pg_catalog.>) 1
       OR pg_catalog.current_setting('keepstep.depth_%3$s', true) OPERATOR(pg_catalog.<>) '' THEN
      doubt := %7$sdoubts('keepstep.depth_%3$s', pg_catalog.pg_trigger_depth());
    END IF;
    IF %4$s THEN
      had := ARRAY[%8$s]::pg_catalog.text[];
      %9$s
    END IF;
  END IF;
  %11$s
  GET DIAGNOSTICS written = ROW_COUNT;
  IF is_odd OR written OPERATOR(pg_catalog.<>) 1 THEN
    %12$s
    IF had IS NOT NULL THEN
      %10$s
    END IF;
    -- A thousandth of the statements, and what writes much.
    IF is_odd AND doubt IS NULL AND had IS NULL OR written OPERATOR(pg_catalog.>) 1000
       OR pg_catalog.random() OPERATOR(pg_catalog.<) 0.001 THEN
      PERFORM %7$smeasure();
    END IF;
  END IF;
  RETURN NULL;
END
$$, format('%I.gate', current_schema), format('%I.gap', current_schema), shape.relid, coalesce(settings.differ, 'false'),
    -- A partition that was detached has its triggers still.
    CASE WHEN parted THEN format('TG_RELID OPERATOR(pg_catalog.<>) %1$s AND pg_catalog.pg_partition_root(TG_RELID) IS DISTINCT FROM %1$s',
                                 shape.relid) ELSE 'false' END,
    current_schema, own, settings.had, coalesce(settings.made, 'NULL;'), coalesce(settings.restored, 'NULL;'),
    CASE op WHEN 'insert' THEN inserted WHEN 'update' THEN updated WHEN 'delete' THEN deleted
            ELSE step(shape.shape, 't', 'NULL::pg_catalog.int2[], NULL::pg_catalog.text, NULL::pg_catalog.text') END,
    CASE WHEN op = 'update' AND NOT shape.by_row THEN format('IF written OPERATOR(pg_catalog.=) 0 THEN
      %s
      GET DIAGNOSTICS written = ROW_COUNT;
    END IF;', paired) ELSE 'NULL;' END);
END
$body$;

-- Whether a table was changed in this transaction at a deeper level of triggers than this one: then what this level has to tell may be
-- older. `setting` is the deepest level so far.
CREATE OR REPLACE FUNCTION doubts(setting text, depth int) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $doubts$
DECLARE
  deepest int := coalesce(nullif(current_setting(setting, true), '')::int, 1);
BEGIN
  IF depth > deepest THEN
    PERFORM set_config(setting, depth::text, true);
  END IF;
  RETURN depth < deepest;
END
$doubts$;

-- Closes the outbox where it is full, and calls nobody any more who is not there: a daemon that was killed in its sleep. Who writes
-- asks for this now and then, and always after many rows.
CREATE OR REPLACE FUNCTION measure() RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $measure$
DECLARE
  gate_now bigint := pg_sequence_last_value('gate');
BEGIN
  IF gate_now < 4 AND pg_total_relation_size(format('outbox_%s', gate_now & 1)::regclass)
                      >= (SELECT size_limit FROM state WHERE size_limit > 0) THEN
    PERFORM setval('gate', gate_now | 4);
  ELSIF gate_now & 2 <> 0 AND NOT EXISTS (
      SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database
      WHERE d.datname = current_database() AND l.locktype = 'advisory' AND l.objsubid = 2
        AND l.classid = 1801807216 AND l.objid = current_schema::regnamespace::oid) THEN
    PERFORM setval('gate', gate_now & ~2::bigint);
  END IF;
END
$measure$;

-- Follows a table no longer. Rows that are there stay.
CREATE OR REPLACE FUNCTION forget(followed oid) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $forget$
DECLARE
  found record;
BEGIN
  FOR found IN
    SELECT t.tgname AS name, t.tgrelid::regclass AS relation FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE p.proname IN (SELECT capture_name(followed, op) FROM ops() AS op) AND p.pronamespace = current_schema::regnamespace
  LOOP
    EXECUTE format('DROP TRIGGER %I ON %s', found.name, found.relation);
  END LOOP;
  FOR found IN SELECT op FROM ops() AS op LOOP
    EXECUTE format('DROP FUNCTION IF EXISTS %I()', capture_name(followed, found.op));
  END LOOP;
  UPDATE tables SET is_present = false WHERE relid = followed AND is_present;
END
$forget$;

-- A message that comes in its place among the changes, like pg_logical_emit_message(true, …); the row's id.
CREATE OR REPLACE FUNCTION emit(prefix text, content text) RETURNS pg_lsn
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $emit$
DECLARE
  gate_now bigint := pg_sequence_last_value('gate');
  written pg_lsn;
BEGIN
  IF gate_now & 2 <> 0 THEN
    PERFORM pg_notify(current_schema::text, '');
  END IF;
  EXECUTE format('INSERT INTO outbox_%s (id, xid, op, old, new)
                  VALUES (pg_current_wal_insert_lsn(), pg_current_xact_id(), ''m'', $1, $2) RETURNING id', gate_now & 1)
    INTO written USING prefix, content;
  RETURN written;
END
$emit$;

-- Whether writers shall wake the daemon. They see it at once, however old their snapshot is.
CREATE OR REPLACE FUNCTION sleep(asleep boolean) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $sleep$
  SELECT FROM (SELECT setval('gate', CASE WHEN asleep THEN gate_now | 2 ELSE gate_now & ~2::bigint END)
               FROM pg_sequence_last_value('gate') AS gate_now) AS done
$sleep$;

-- Opens an outbox that was full. What was not written meanwhile is lost; `gap` has changed with each such statement.
CREATE OR REPLACE FUNCTION reopen() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $reopen$
  SELECT FROM (SELECT setval('gate', gate_now & ~4::bigint) FROM pg_sequence_last_value('gate') AS gate_now) AS done
$reopen$;

-- One step towards an empty outbox, to be called by the daemon from time to time: empties the half that is not written to, if all of
-- it was visible in `confirmed`; or, where that half is empty, has the next rows written there. Says whether it did anything: not
-- while anybody is at work in that half.
-- What it costs: ACCESS EXCLUSIVE on a table that hardly anybody writes to, waited for 50 ms at most. Who writes to the other half
-- does not wait.
CREATE OR REPLACE FUNCTION rotate(confirmed pg_snapshot) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '50ms' AS $rotate$
DECLARE
  gate_now bigint := pg_sequence_last_value('gate');
  written regclass := format('outbox_%s', gate_now & 1)::regclass;
  resting regclass := format('outbox_%s', 1 - (gate_now & 1))::regclass;
  unread boolean;
BEGIN
  -- What is committed while it waits for the lock has to be seen.
  IF current_setting('transaction_isolation') <> 'read committed' THEN
    RAISE 'rotate() needs a transaction that is read committed';
  END IF;
  IF pg_relation_size(resting) = 0 THEN
    IF pg_relation_size(written) > 0 THEN
      PERFORM setval('gate', gate_now # 1);
      RETURN true;
    END IF;
    RETURN false;
  END IF;
  EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', resting);
  EXECUTE format('SELECT EXISTS (SELECT FROM %s WHERE xid >= pg_snapshot_xmin($1) AND NOT pg_visible_in_snapshot(xid, $1))', resting)
    INTO unread USING confirmed;
  IF NOT unread THEN
    EXECUTE format('TRUNCATE %s', resting);
  END IF;
  RETURN NOT unread;
EXCEPTION WHEN lock_not_available THEN
  RETURN false;
END
$rotate$;

-- Begins anew: what is in the outbox counts no more. Gives where, and what was visible there; nothing while somebody reads it. Rows
-- of transactions that still write may stay, as what comes behind.
-- What it costs: as rotate(), of both halves.
CREATE OR REPLACE FUNCTION renew() RETURNS TABLE (lsn pg_lsn, snapshot pg_snapshot)
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '50ms' AS $renew$
DECLARE
  this bigint := (pg_control_system()).system_identifier;
BEGIN
  IF NOT pg_try_advisory_xact_lock(1801807216, current_schema::regnamespace::oid::int8::bit(32)::int4) THEN
    RETURN;
  END IF;
  BEGIN
    LOCK TABLE outbox_0, outbox_1 IN ACCESS EXCLUSIVE MODE;
    TRUNCATE outbox_0, outbox_1;
  EXCEPTION WHEN lock_not_available THEN
    -- Of another server's rows nothing says when they were written.
    IF EXISTS (SELECT FROM state WHERE system <> this OR confirmed_lsn > pg_current_wal_insert_lsn()) THEN
      RAISE;
    END IF;
  END;
  PERFORM reopen();
  SELECT pg_current_wal_insert_lsn(), pg_current_snapshot() INTO lsn, snapshot;
  UPDATE state SET system = this, made_lsn = lsn, confirmed_lsn = lsn;
  RETURN NEXT;
END
$renew$;

-- What the daemon's role needs, and no more.
CREATE OR REPLACE FUNCTION admit(role text) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $admit$
BEGIN
  EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema, role);
  EXECUTE format('GRANT SELECT ON outbox, tables, state, retyped, gap, gate TO %I', role);
  EXECUTE format('GRANT UPDATE (confirmed_lsn) ON state TO %I', role);
  EXECUTE format('GRANT EXECUTE ON FUNCTION rotate(pg_snapshot), emit(text, text), sleep(boolean), reopen(), renew(), '
                 'findings(regclass, text[]), shape_of(regclass, text[]), triggers_of(regclass, boolean), capture_name(oid, text), '
                 'ops(), capture_body(tables, text), settings_of(oid[]), step(int, "char", text, text), put(int, "char", text, int, text) TO %I', role);
END
$admit$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA :"schema" FROM PUBLIC;
SELECT admit(:'role') WHERE :'role' <> '';

COMMIT;
