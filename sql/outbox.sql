-- What keepstep reads where there is no logical decoding: an outbox, a table that triggers fill with what changed. The same
-- as `keepstep setup` makes with `source = "outbox"`, for whoever prefers to run it by hand. To be run in the application's
-- database by a role that has CREATE on it and owns the tables (or by a superuser):
--
--   psql -d shop -v role=keepstep -f outbox.sql
--   psql -d shop -c "SELECT keepstep.follow('public.products', '{id,name,price}')"      for each table of the rules
--
-- -v schema=other gives another name than keepstep; it is `slot` of the rules file. `role` is what the daemon connects as. It
-- may be run again; rows, and tables that are followed, stay.
--
-- THE INTERFACE
--   state     one row. `confirmed_lsn`: what was drained up to there is in the cache. `asleep`: whoever writes sends NOTIFY on
--             the channel of the schema's name. `part`: the half of the outbox that is written to.
--   tables    one row for each shape that a followed table had: its stored columns in order. `is_present` says whether it is
--             the table's shape of now. Rows name the shape, so that an old row is read by the shape of its time.
--   outbox    the rows. Within one transaction, and for one row of a table, the order of `id` is the order of what happened.
--             op    i  inserted: `new`
--                   u  updated: `new`; `old` where the identity changed or all old columns are stored
--                   d  deleted: `old`
--                   t  truncated
--                   m  a message: `old` is its prefix, `new` its text; no shape
--             old, new  a row's text, as ROW(a, b)::text gives it: each column as its own output function writes it with
--                   DateStyle ISO, TimeZone UTC, IntervalStyle postgres, extra_float_digits 1, bytea_output hex. `new` has
--                   the columns of `tables.columns`; `old` has those too where `tables.is_full`, else only those of
--                   `tables.identity`, in that order. NULL is no image.
--             gone  NULL, or places in `tables.columns` (from 1 on) that the table no longer has, or has with another type:
--                   what `old` and `new` have in these places means nothing.
--             doubt true: a trigger of the application's changed the same table in the course of this statement. Which came
--                   last is not known here; the row has to be read from the table.
--   gap       a sequence. Its value changes when rows could not be written: what they said is lost.
--
-- WHAT IT COSTS, each statement that writes to a followed table: one INSERT into `outbox` with an entry in one index, one read
-- of `state`; nothing is locked that others wait for. See README for measured figures.

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
  confirmed_lsn pg_lsn      NOT NULL DEFAULT pg_current_wal_insert_lsn(),
  part          smallint    NOT NULL DEFAULT 0,
  asleep        boolean     NOT NULL DEFAULT false,
  size_limit    bigint      NOT NULL DEFAULT 0
);
COMMENT ON TABLE state IS 'keepstep: what writers and the daemon tell each other';

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
  is_present boolean  NOT NULL DEFAULT true
);
CREATE UNIQUE INDEX IF NOT EXISTS tables_present ON tables (relid) WHERE is_present;
COMMENT ON TABLE tables IS 'keepstep: the tables that are followed, and what of them is stored';

-- Two halves, so that what was read goes by TRUNCATE: nothing is ever deleted row by row, and nothing has to be vacuumed.
CREATE TABLE IF NOT EXISTS outbox (
  id    bigint   NOT NULL,
  xid   xid8     NOT NULL,
  part  smallint NOT NULL,
  gone  smallint[],
  shape int,
  op    "char"   NOT NULL,
  doubt boolean  NOT NULL,
  old   text,
  new   text
) PARTITION BY LIST (part);
CREATE TABLE IF NOT EXISTS outbox_0 PARTITION OF outbox FOR VALUES IN (0) WITH (autovacuum_enabled = false);
CREATE TABLE IF NOT EXISTS outbox_1 PARTITION OF outbox FOR VALUES IN (1) WITH (autovacuum_enabled = false);
CREATE INDEX IF NOT EXISTS outbox_xid ON outbox (xid);
CREATE SEQUENCE IF NOT EXISTS shape;
CREATE SEQUENCE IF NOT EXISTS outbox_id;
CREATE SEQUENCE IF NOT EXISTS gap;
COMMENT ON TABLE outbox IS 'keepstep: what changed';

INSERT INTO state (version) VALUES (1) ON CONFLICT (one) DO UPDATE SET version = excluded.version;

-- What each writer asks: which half is written to. Wakes the daemon if it sleeps; gives no row, and marks the gap, where the
-- outbox is full.
CREATE OR REPLACE VIEW gate AS
  SELECT part, CASE WHEN asleep THEN pg_notify(:'schema', '')::text END AS woken
  FROM state
  WHERE one AND (size_limit = 0
    OR pg_relation_size(CASE part WHEN 0 THEN 'outbox_0'::regclass ELSE 'outbox_1'::regclass END) < size_limit
    OR nextval('gap') IS NULL);


-- What is stored of a table: these of its columns (NULL is all) and those of its replica identity. `shape` is left open.
CREATE OR REPLACE FUNCTION shape_of(followed regclass, wanted text[]) RETURNS tables
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $shape_of$
  SELECT ROW(NULL, c.oid, n.nspname, c.relname, columns.name, columns.type, columns.typmod, columns.identity,
             c.relreplident = 'f', true)::tables
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
  WHERE c.oid = followed
$shape_of$;

-- The name of the function that the triggers of a table call.
CREATE OR REPLACE FUNCTION capture_name(followed oid) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT 'capture_' || followed $$;

-- The triggers that a followed table has, and each of its partitions: what is written to a partition itself fires no trigger of
-- the table's. TRUNCATE of a partition says nothing of the rest; keepstep sees it in the catalog.
CREATE OR REPLACE FUNCTION triggers_of(followed regclass) RETURNS TABLE (relation regclass, name text, op text, tables text, is_there boolean)
LANGUAGE sql STABLE SET search_path FROM CURRENT AS $triggers_of$
  SELECT part.relid, wanted.name, kind.op, kind.tables,
         EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                 WHERE t.tgrelid = part.relid AND t.tgname = wanted.name AND t.tgenabled = 'A'
                   AND p.proname = capture_name(followed) AND p.pronamespace = current_schema::regnamespace)
  FROM (SELECT followed UNION SELECT relid FROM pg_partition_tree(followed)) AS part(relid)
  CROSS JOIN (VALUES ('insert', 'REFERENCING NEW TABLE AS new_rows'),
                     ('update', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
                     ('delete', 'REFERENCING OLD TABLE AS old_rows'),
                     ('truncate', '')) AS kind(op, tables)
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
  ELSIF NOT EXISTS (SELECT FROM pg_proc WHERE proname = capture_name(followed) AND pronamespace = current_schema::regnamespace
                      AND prosrc = capture_body(has)) THEN
    RETURN NEXT 'the function of its triggers is not the one of this version';
  END IF;
  RETURN QUERY SELECT format('trigger %I on %s is missing or not enabled', t.name, t.relation)
    FROM triggers_of(followed) AS t WHERE NOT t.is_there;
END
$findings$;

-- Follows a table, or follows it as it is now. Says whether anything had to be done. The table's owner must call it.
-- What it costs: SHARE ROW EXCLUSIVE on the table, which waits for writers under way and lets no new ones in meanwhile.
CREATE OR REPLACE FUNCTION follow(followed regclass, wanted text[] DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $follow$
DECLARE
  had tables;
  has tables;
  settings text;
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
  SELECT string_agg(format(' SET %s = %s', setting.name, setting.value), '') INTO settings
    FROM settings_of(has.types) AS setting;
  EXECUTE format('CREATE OR REPLACE FUNCTION %I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = %I, pg_temp%s AS %L',
                 capture_name(followed), current_schema, settings, capture_body(has));
  EXECUTE format('REVOKE ALL ON FUNCTION %I() FROM PUBLIC', capture_name(followed));
  FOR missing IN SELECT * FROM triggers_of(followed) WHERE NOT is_there LOOP
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s FOR EACH STATEMENT EXECUTE FUNCTION %I()',
                   missing.name, missing.op, missing.relation, missing.tables, capture_name(followed));
    -- Also for sessions that replicate from elsewhere.
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', missing.relation, missing.name);
  END LOOP;
  RETURN true;
END
$follow$;

-- The settings that the text of such values depends on.
CREATE OR REPLACE FUNCTION settings_of(types oid[]) RETURNS TABLE (name text, value text)
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
  SELECT setting, wanted FROM (VALUES
    ('DateStyle', 'ISO', '{date,timestamp,timestamptz}'::regtype[]),
    ('TimeZone', 'UTC', '{timestamptz}'),
    ('IntervalStyle', 'postgres', '{interval}'),
    ('extra_float_digits', '1', '{float4,float8,point,lseg,path,box,polygon,line,circle}'),
    ('bytea_output', 'hex', '{bytea}')) AS known(setting, wanted, dependent)
  WHERE EXISTS (SELECT FROM part WHERE oid = ANY (dependent)
                -- A type of an extension may contain anything.
                OR EXISTS (SELECT FROM pg_type t WHERE t.oid = part.oid AND t.typtype = 'b' AND t.typelem = 0
                           AND t.typnamespace <> 'pg_catalog'::regnamespace));
$settings$;

-- What the trigger function of a table does.
CREATE OR REPLACE FUNCTION capture_body(shape tables) RETURNS text
LANGUAGE plpgsql STABLE SET search_path FROM CURRENT AS $body$
DECLARE
  whole text := (SELECT string_agg(quote_ident(name), ', ') FROM unnest(shape.columns) AS name);
  key   text := (SELECT string_agg(quote_ident(name), ', ') FROM unnest(shape.identity) AS name);
  as_it_was text := (SELECT string_agg(format('pg_typeof(%I) = ''%s''::regtype', name, type), ' AND ')
                     FROM unnest(shape.columns, shape.types) AS c(name, type));
  gone text := (SELECT string_agg(format('CASE WHEN pg_typeof(%I) <> ''%s''::regtype THEN %s END', name, type, place), ', ')
                FROM unnest(shape.columns, shape.types) WITH ORDINALITY AS c(name, type, place));
  -- A column that is no longer there is looked for one level further out, and found here: so nothing fails.
  missing text := (SELECT string_agg(format('NULL::state AS %I', name), ', ') FROM unnest(shape.columns) AS name);
  put text := format('INSERT INTO outbox (id, xid, part, shape, doubt, op, old, new, gone)
    SELECT nextval(''outbox_id''), pg_current_xact_id(), gate.part, %s, $doubt$, ', shape.shape);
BEGIN
  key := format('ROW(%s)::text', CASE WHEN shape.is_full THEN whole ELSE key END);
  whole := format('ROW(%s)::text', whole);
  gone := format('CASE WHEN %s THEN NULL ELSE array_remove(ARRAY[%s], NULL)::smallint[] END', as_it_was, gone);
  missing := format('(SELECT %s) AS missing', missing);
  put := replace(put, '$doubt$', 'depth < deepest');
  RETURN format($text$
#variable_conflict use_column
DECLARE
  depth int := pg_trigger_depth();
  deepest int := coalesce(nullif(current_setting('keepstep.depth_%1$s', true), '')::int, 1);
BEGIN
  IF depth > deepest THEN
    PERFORM set_config('keepstep.depth_%1$s', depth::text, true);
  END IF;
  IF TG_OP = 'INSERT' THEN
    %2$s'i', NULL, image.whole, image.gone
    FROM gate, %3$s,
         LATERAL (SELECT %4$s AS whole, %5$s AS gone FROM new_rows) AS image;
  ELSIF TG_OP = 'UPDATE' THEN
    %2$s'u', pair.old, pair.whole, pair.gone
    FROM gate,
         (SELECT CASE WHEN %7$s THEN before.key END AS old, after.whole, coalesce(after.gone, before.gone) AS gone
          FROM (SELECT row_number() OVER () AS place, image.*
                FROM %3$s, LATERAL (SELECT %6$s AS key, %5$s AS gone FROM old_rows) AS image) AS before
          FULL JOIN (SELECT row_number() OVER () AS place, image.*
                     FROM %3$s, LATERAL (SELECT %6$s AS key, %4$s AS whole, %5$s AS gone FROM new_rows) AS image) AS after
          USING (place)
          ORDER BY place) AS pair;
  ELSIF TG_OP = 'DELETE' THEN
    %2$s'd', image.key, NULL, image.gone
    FROM gate, %3$s,
         LATERAL (SELECT %6$s AS key, %5$s AS gone FROM old_rows) AS image;
  ELSE
    %2$s't', NULL, NULL, NULL
    FROM gate;
  END IF;
  RETURN NULL;
END
$text$, shape.relid, put, missing, whole, gone, key, CASE WHEN shape.is_full THEN 'true' ELSE 'before.key <> after.key' END);
END
$body$;

-- Follows a table no longer. Rows that are there stay.
CREATE OR REPLACE FUNCTION forget(followed oid) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $forget$
DECLARE
  found record;
BEGIN
  FOR found IN
    SELECT t.tgname AS name, t.tgrelid::regclass AS relation FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE p.proname = capture_name(followed) AND p.pronamespace = current_schema::regnamespace
  LOOP
    EXECUTE format('DROP TRIGGER %I ON %s', found.name, found.relation);
  END LOOP;
  EXECUTE format('DROP FUNCTION IF EXISTS %I()', capture_name(followed));
  UPDATE tables SET is_present = false WHERE relid = followed AND is_present;
END
$forget$;

-- A message that comes in its place among the changes, like pg_logical_emit_message(true, …); the row's id.
CREATE OR REPLACE FUNCTION emit(prefix text, content text) RETURNS bigint
LANGUAGE sql SECURITY DEFINER SET search_path FROM CURRENT AS $emit$
  INSERT INTO outbox (id, xid, part, op, doubt, old, new)
  SELECT nextval('outbox_id'), pg_current_xact_id(), part, 'm', false, prefix, content FROM state
  RETURNING id
$emit$;

-- Empties the half that is not written to, if all of it was visible in `confirmed`, and has the next rows written there. To be
-- called by the daemon from time to time. Says whether that could be done: not while anybody else is at work in that half.
-- What it costs: ACCESS EXCLUSIVE on a table that hardly anybody writes to, waited for 50 ms at most. Nobody who writes to the
-- other half waits.
CREATE OR REPLACE FUNCTION rotate(confirmed pg_snapshot) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT SET lock_timeout = '50ms' AS $rotate$
DECLARE
  resting smallint := (SELECT 1 - part FROM state);
  half regclass := format('outbox_%s', resting)::regclass;
  unread boolean;
BEGIN
  IF pg_relation_size(half) > 0 THEN
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', half);
    SELECT EXISTS (SELECT FROM outbox
                   WHERE part = resting AND xid >= pg_snapshot_xmin(confirmed) AND NOT pg_visible_in_snapshot(xid, confirmed))
      INTO unread;
    IF unread THEN
      RETURN false;
    END IF;
    EXECUTE format('TRUNCATE %s', half);
  END IF;
  IF EXISTS (SELECT FROM outbox WHERE part = 1 - resting LIMIT 1) THEN
    UPDATE state SET part = resting;
  END IF;
  RETURN true;
EXCEPTION WHEN lock_not_available THEN
  RETURN false;
END
$rotate$;

-- What the daemon's role needs, and no more.
CREATE OR REPLACE FUNCTION admit(role text) RETURNS void
LANGUAGE plpgsql SET search_path FROM CURRENT AS $admit$
BEGIN
  EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema, role);
  EXECUTE format('GRANT SELECT ON outbox, tables, state, gap TO %I', role);
  EXECUTE format('GRANT UPDATE (confirmed_lsn, asleep) ON state TO %I', role);
  EXECUTE format('GRANT EXECUTE ON FUNCTION rotate(pg_snapshot), emit(text, text), findings(regclass, text[]), '
                 'shape_of(regclass, text[]), triggers_of(regclass), capture_name(oid), capture_body(tables) TO %I', role);
END
$admit$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA :"schema" FROM PUBLIC;
SELECT admit(:'role') WHERE :'role' <> '';

COMMIT;
