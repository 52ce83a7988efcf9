-- Row-level security: a second wall between tenants, behind the conditions of the statements. It
-- stands once an operator enables it (see 'The least role' of the manual), when no server of schema
-- version 5 runs any more: those do not say which tenants a transaction is about.
--
-- `aegis.tenants` says it, as an array, or as '*' for work on all tenants: then the array is NULL,
-- and so is the comparison. Where it is not set, or empty behind a pooler, every statement that meets
-- a row fails: a row that is there must not look like one that is not. The sub-select is run once in
-- a statement, not for each row; a second one would cost a short statement a sixth more. `coalesce`
-- is taken for true of every other row, and the plans stay what they were: with IS NOT FALSE hardly any
-- row is expected, and a list is sorted instead of read in the order of its index.
--
-- The policy of a partitioned table guards it alone. Whoever may read its partitions by their names
-- walks around it, and no server needs that right.

DO $do$
DECLARE
    walled text;
    patience timestamptz := clock_timestamp() + interval '60s';
BEGIN
    -- All at once or none, each within less time than PostgreSQL takes to look for deadlocks: who
    -- works on these tables locks them in another order, and none of that may fail.
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '100ms', true);
            LOCK TABLE action, claim, event, feed, chain IN ACCESS EXCLUSIVE MODE;
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            IF clock_timestamp() > patience THEN
                RAISE;
            END IF;
            PERFORM pg_sleep(0.1);
        END;
    END LOOP;
    PERFORM set_config('lock_timeout', '60s', true);
    FOREACH walled IN ARRAY ARRAY['action', 'claim', 'event', 'feed', 'chain'] LOOP
        EXECUTE format(
            $$CREATE POLICY aegis_tenants ON %I USING (coalesce(tenant_id = ANY ((
                SELECT array_remove(nullif(current_setting('aegis.tenants'), '*')::text[], NULL)
              )::text[]), true))$$,
            walled);
    END LOOP;
END $do$;
