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
  shape      int      PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
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


-- Follows a table, or follows it as it is now: stores these columns (NULL is all) and those of its replica identity, from
-- triggers on it and on each of its partitions. Says whether anything had to be done. Its owner must call it.
-- What it costs: SHARE ROW EXCLUSIVE on the table, which waits for writers under way and lets no new ones in meanwhile.
CREATE OR REPLACE FUNCTION follow(followed regclass, wanted text[] DEFAULT NULL) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $follow$
DECLARE
  now_has tables%ROWTYPE;
  had tables%ROWTYPE;
  function_name text := format('capture_%s', followed::oid);
  body text;
  settings text;
  part record;
  done boolean := false;
BEGIN
  SELECT c.oid, n.nspname, c.relname, c.relreplident = 'f'
    INTO now_has.relid, now_has.schema, now_has.name, now_has.is_full
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = followed;
  SELECT array_agg(a.attname::text ORDER BY a.attnum), array_agg(a.atttypid ORDER BY a.attnum),
         array_agg(a.atttypmod ORDER BY a.attnum),
         coalesce(array_agg(a.attname::text ORDER BY a.attnum) FILTER (WHERE now_has.is_full OR is_key), '{}')
    INTO now_has.columns, now_has.types, now_has.typmods, now_has.identity
    FROM pg_attribute a
    CROSS JOIN LATERAL (SELECT EXISTS (
      SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
      WHERE i.indrelid = a.attrelid AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
        AND (c.relreplident = 'd' AND i.indisprimary OR c.relreplident = 'i' AND i.indisreplident))) AS k(is_key)
    WHERE a.attrelid = followed AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
      AND (wanted IS NULL OR a.attname = ANY (wanted) OR is_key);

  SELECT * INTO had FROM tables WHERE relid = followed AND is_present;
  IF had IS NULL OR (had.schema, had.name, had.columns, had.types, had.typmods, had.identity, had.is_full)
     IS DISTINCT FROM (now_has.schema, now_has.name, now_has.columns, now_has.types, now_has.typmods, now_has.identity, now_has.is_full)
  THEN
    UPDATE tables SET is_present = false WHERE relid = followed AND is_present;
    INSERT INTO tables (relid, schema, name, columns, types, typmods, identity, is_full)
      VALUES (now_has.relid, now_has.schema, now_has.name, now_has.columns, now_has.types, now_has.typmods,
              now_has.identity, now_has.is_full)
      RETURNING shape INTO now_has.shape;
    done := true;
  ELSE
    now_has.shape := had.shape;
  END IF;

  body := capture_body(now_has);
  SELECT string_agg(format(' SET %s = %s', setting.name, setting.value), '') INTO settings
    FROM settings_of(now_has.types) AS setting;
  IF NOT EXISTS (SELECT FROM pg_proc WHERE proname = function_name AND pronamespace = current_schema::regnamespace
                   AND prosrc = body) THEN
    EXECUTE format('CREATE OR REPLACE FUNCTION %I() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER '
                   'SET search_path = %I, pg_temp%s AS %L', function_name, current_schema, settings, body);
    done := true;
  END IF;

  FOR part IN
    SELECT relid, relid = followed AS is_root FROM (SELECT followed::oid UNION SELECT relid::oid FROM pg_partition_tree(followed)) AS tree(relid)
  LOOP
    done := add_triggers(part.relid, function_name, part.is_root) OR done;
  END LOOP;
  RETURN done;
END
$follow$;

-- The triggers of one table or partition, where they are missing or not as they should be.
CREATE OR REPLACE FUNCTION add_triggers(relation regclass, function_name text, is_root boolean) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $add$
DECLARE
  kind record;
  done boolean := false;
BEGIN
  FOR kind IN
    SELECT format('%s_%s', left(current_schema, 50), op) AS name, op, tables
    FROM (VALUES ('insert', 'REFERENCING NEW TABLE AS new_rows'),
                 ('update', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
                 ('delete', 'REFERENCING OLD TABLE AS old_rows'),
                 ('truncate', '')) AS kinds(op, tables)
    WHERE op <> 'truncate' OR is_root
  LOOP
    CONTINUE WHEN EXISTS (
      SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
      WHERE t.tgrelid = relation AND t.tgname = kind.name AND t.tgenabled = 'A'
        AND p.proname = function_name AND p.pronamespace = current_schema::regnamespace);
    EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s FOR EACH STATEMENT EXECUTE FUNCTION %I()',
                   kind.name, kind.op, relation, kind.tables, function_name);
    EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', relation, kind.name);
    done := true;
  END LOOP;
  RETURN done;
END
$add$;

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
CREATE OR REPLACE FUNCTION forget(followed oid) RETURNS boolean
LANGUAGE plpgsql SET search_path FROM CURRENT AS $forget$
DECLARE
  trigger record;
BEGIN
  FOR trigger IN
    SELECT t.tgname, t.tgrelid::regclass AS relation FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE p.proname = format('capture_%s', followed) AND p.pronamespace = current_schema::regnamespace
  LOOP
    EXECUTE format('DROP TRIGGER %I ON %s', trigger.tgname, trigger.relation);
  END LOOP;
  EXECUTE format('DROP FUNCTION IF EXISTS %I()', format('capture_%s', followed));
  UPDATE tables SET is_present = false WHERE relid = followed AND is_present;
  RETURN FOUND;
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
  EXECUTE format('GRANT EXECUTE ON FUNCTION rotate(pg_snapshot), emit(text, text) TO %I', role);
END
$admit$;

REVOKE ALL ON FUNCTION follow(regclass, text[]), add_triggers(regclass, text, boolean), forget(oid), admit(text),
  rotate(pg_snapshot), emit(text, text) FROM PUBLIC;
SELECT admit(:'role') WHERE :'role' <> '';

COMMIT;
