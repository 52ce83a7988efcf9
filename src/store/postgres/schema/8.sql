-- Records new actions with their events, and returns the ids of those whose identities were not on
-- record. A function, as its statements are then planned once for each connection, whoever shares
-- that: half of the time of a small batch went into reading and planning one large statement. It
-- does what the caller may.
CREATE FUNCTION aegis_record(
    -- The columns of the actions, and what a tombstone has of their identities.
    tenants text[], ids uuid[], threads text[], keys text[], statuses text[], decisions text[],
    digests bytea[], payloads text[], comments text[], titles text[], expiries timestamptz[], edits
    boolean[], submitters text[], deciders text[], calls text[], created timestamptz[], decided
    timestamptz[], counts integer[], identities bytea[],
    -- The columns of the events.
    event_tenants text[], event_actions uuid[], event_numbers integer[], event_times timestamptz[],
    event_ids uuid[], event_actors text[], event_kinds text[], event_froms text[], event_tos text[],
    event_decisions text[], event_executions text[], event_calls text[], event_digests bytea[]
) RETURNS uuid[] LANGUAGE plpgsql AS $$
DECLARE
    added uuid[];
BEGIN
    -- A move into this database has the table locked while there may be tombstones to come.
    LOCK TABLE action IN ROW EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM tombstone) THEN
        WITH new AS (
            INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest,
                payload, comment, title, expires_at, allow_edit, submitted_by, decided_by, call_id,
                created_at, decided_at, events)
            SELECT n.tenant_id, n.request_id, n.thread_id, n.idempotency_key, n.status, n.decision,
                n.digest, n.payload, n.comment, n.title, n.expires_at, n.allow_edit, n.submitted_by,
                n.decided_by, n.call_id, n.created_at, n.decided_at, n.events
            FROM unnest(tenants, ids, threads, keys, statuses, decisions, digests, payloads, comments,
                titles, expiries, edits, submitters, deciders, calls, created, decided, counts,
                identities)
                AS n (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest,
                payload, comment, title, expires_at, allow_edit, submitted_by, decided_by, call_id,
                created_at, decided_at, events, identity)
            WHERE NOT EXISTS (SELECT FROM tombstone t WHERE t.identity = n.identity)
            ON CONFLICT (tenant_id, thread_id, idempotency_key) DO NOTHING
            RETURNING request_id
        ) SELECT array_agg(request_id) INTO added FROM new;
    ELSE
        WITH new AS (
            INSERT INTO action (tenant_id, request_id, thread_id, idempotency_key, status, decision, digest,
                payload, comment, title, expires_at, allow_edit, submitted_by, decided_by, call_id,
                created_at, decided_at, events)
            SELECT * FROM unnest(tenants, ids, threads, keys, statuses, decisions, digests, payloads, comments,
                titles, expiries, edits, submitters, deciders, calls, created, decided, counts)
            ON CONFLICT (tenant_id, thread_id, idempotency_key) DO NOTHING
            RETURNING request_id
        ) SELECT array_agg(request_id) INTO added FROM new;
    END IF;
    INSERT INTO event (tenant_id, request_id, number, at, event_id, actor, kind, from_status, to_status,
        decision, execution, call_id, digest, epoch)
    SELECT e.*, (SELECT epoch FROM cluster)
    FROM unnest(event_tenants, event_actions, event_numbers, event_times, event_ids, event_actors,
        event_kinds, event_froms, event_tos, event_decisions, event_executions, event_calls, event_digests)
        AS e (tenant_id, request_id)
    WHERE cardinality(added) = cardinality(ids) OR e.request_id = ANY (added);
    RETURN coalesce(added, '{}');
END $$;
