-- Records new actions, each with its first event, and returns the ids of those whose identities were
-- not on record. A function, as its statements are then planned once for each connection, whoever
-- shares that. It does what the caller may.
--
-- It takes the place of `aegis_record`, which servers of version 8 call. Half of the time of that was
-- spent on its 32 arrays, and on looking up each identity that was not there. Here what follows from
-- something else is no argument: a new action is pending, or it is decided at once, by whoever made it.
CREATE FUNCTION aegis_insert(
    tenants text[], ids uuid[], threads text[], keys text[], event_ids uuid[], times timestamptz[],
    actors text[],
    -- An array is NULL where all of its elements would be.
    calls text[], decisions text[], digests bytea[], payloads text[], comments text[], titles text[],
    expiries timestamptz[], edits boolean[],
    -- Whether to look up the identities first. Otherwise one that is on record costs all of them a
    -- second attempt.
    is_careful boolean
) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    has_tombstones boolean;
    added uuid[];
BEGIN
    -- A move into this database has the table locked while there may be tombstones to come.
    LOCK TABLE action IN ROW EXCLUSIVE MODE;
    has_tombstones := EXISTS (SELECT FROM tombstone);
    IF NOT is_careful AND NOT has_tombstones THEN
        BEGIN
            INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest,
                payload, comment, title, expires_at, allow_edit, submitted_by, decided_by, call_id,
                created_at, decided_at, events)
            SELECT tenant, id, thread, key, CASE WHEN decision IS NULL THEN 'PENDING' ELSE 'COMMITTED' END,
                decision, digest, payload, comment, title, expiry, edit,
                CASE WHEN decision IS NULL THEN actor END, CASE WHEN decision IS NOT NULL THEN actor END,
                CASE WHEN decision IS NOT NULL THEN call END, at, CASE WHEN decision IS NOT NULL THEN at END, 1
            FROM unnest(tenants, ids, threads, keys, times, actors, calls, decisions, digests, payloads,
                comments, titles, expiries, edits)
                AS n (tenant, id, thread, key, at, actor, call, decision, digest, payload, comment, title,
                expiry, edit);
            added := ids;
        EXCEPTION WHEN unique_violation THEN
            -- Nothing of it stays.
        END;
    END IF;
    IF added IS NULL THEN
        WITH new AS (
            INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest,
                payload, comment, title, expires_at, allow_edit, submitted_by, decided_by, call_id,
                created_at, decided_at, events)
            SELECT tenant, id, thread, key, CASE WHEN decision IS NULL THEN 'PENDING' ELSE 'COMMITTED' END,
                decision, digest, payload, comment, title, expiry, edit,
                CASE WHEN decision IS NULL THEN actor END, CASE WHEN decision IS NOT NULL THEN actor END,
                CASE WHEN decision IS NOT NULL THEN call END, at, CASE WHEN decision IS NOT NULL THEN at END, 1
            FROM unnest(tenants, ids, threads, keys, times, actors, calls, decisions, digests, payloads,
                comments, titles, expiries, edits)
                AS n (tenant, id, thread, key, at, actor, call, decision, digest, payload, comment, title,
                expiry, edit)
            CROSS JOIN LATERAL (SELECT
                set_byte(decode('00', 'hex'), 0, length(tenant)) || convert_to(tenant, 'UTF8')
                    || set_byte(decode('00', 'hex'), 0, length(thread)) || convert_to(thread, 'UTF8'),
                set_byte(decode('00', 'hex'), 0, length(key)) || convert_to(key, 'UTF8')) AS i (start, rest)
            WHERE NOT has_tombstones OR NOT EXISTS (SELECT FROM tombstone t
                WHERE t.identity = substr(sha256(start), 1, 8) || substr(sha256(start || rest), 1, 8))
            ON CONFLICT (tenant_id, thread_id, idempotency_key) DO NOTHING
            RETURNING request_id
        ) SELECT coalesce(array_agg(request_id), '{}') INTO added FROM new;
    END IF;
    INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, to_status, decision, call_id,
        digest, epoch)
    SELECT tenant, id, 1, at, event, actor,
        CASE decision WHEN 'approve' THEN 'approved' WHEN 'reject' THEN 'rejected' ELSE 'submitted' END,
        CASE WHEN decision IS NULL THEN 'PENDING' ELSE 'COMMITTED' END, decision, call, digest,
        (SELECT epoch FROM cluster)
    FROM unnest(tenants, ids, event_ids, times, actors, calls, decisions, digests)
        AS n (tenant, id, event, at, actor, call, decision, digest)
    WHERE cardinality(added) = cardinality(ids) OR id = ANY (added);
    RETURN added;
END $$;
