-- The checks are chains of OR: SQLite builds a temporary table for each IN of three values or more, on every insert.
CREATE TABLE action (
    id              INTEGER PRIMARY KEY,
    request_id      BLOB NOT NULL UNIQUE CHECK (length(request_id) = 16),
                                                         -- a UUIDv7, so that new ones are neighbours in the index
    identity        BLOB NOT NULL UNIQUE CHECK (length(identity) = 16),
                                                         -- of tenant, thread and key: the start of SHA-256 over each of them
                                                         -- behind a byte that has its length
    tenant_id       TEXT NOT NULL,
    thread_id       TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    status          TEXT NOT NULL CHECK (status = 'PENDING' OR status = 'COMMITTED' OR status = 'FAILED'),
    decision        TEXT CHECK (decision = 'approve' OR decision = 'reject'),
    execution       TEXT CHECK (execution = 'claimed' OR execution = 'completed' OR execution = 'failed'
                        OR execution = 'unknown'),
    closed          TEXT CHECK (closed = 'expired' OR closed = 'cancelled'),
    digest          BLOB CHECK (length(digest) = 32),    -- SHA-256 of the payload's canonical form
    payload         TEXT,
    comment         TEXT,
    call_id         ANY,                                 -- X-Request-Id of the decision: 16 bytes if a UUID, else text
    created_at      INTEGER NOT NULL,                    -- microseconds since 1970, UTC
    decided_at      INTEGER,
    CHECK ((status = 'PENDING') = (decision IS NULL)),
    CHECK ((decision IS NULL) = (decided_at IS NULL)),
    CHECK ((payload IS NULL) = (digest IS NULL)),
    CHECK (status <> 'FAILED' OR decision = 'approve'),
    CHECK (execution IS NULL OR decision = 'approve'),
    CHECK (closed IS NULL OR decision IS NOT NULL)
) STRICT;

-- One row for each transition of an action: the event to deliver and the audit trail in one. It is only ever appended to, and
-- what was delivered is a matter of the cursor of who delivers. Whoever removes old rows keeps the newest one: it is what keeps
-- a sequence number from being given out twice. (AUTOINCREMENT would, but rewrites a row of a second table each time.)
CREATE TABLE event (
    seq         INTEGER PRIMARY KEY,
    event_id    BLOB NOT NULL CHECK (length(event_id) = 16),
    at          INTEGER NOT NULL,                        -- microseconds since 1970, UTC
    actor       TEXT NOT NULL,
    verb        TEXT NOT NULL,                           -- what was asked for: submit, approve, reject
    action      INTEGER NOT NULL REFERENCES action (id),
    from_status TEXT,
    to_status   TEXT NOT NULL,
    decision    TEXT,
    execution   TEXT,
    call_id     ANY                                      -- X-Request-Id of the call
) STRICT;

-- For a status by call id. Ids that are no UUIDs are not looked up.
CREATE INDEX event_call ON event (call_id) WHERE typeof(call_id) = 'blob';

-- One row, rewritten to show that a write is durable.
CREATE TABLE heartbeat (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    at INTEGER NOT NULL
) STRICT;

-- For people: ids and times as text.
CREATE VIEW readable_action AS
SELECT
    lower(format('%s-%s-%s-%s-%s', substr(hex(request_id), 1, 8), substr(hex(request_id), 9, 4),
        substr(hex(request_id), 13, 4), substr(hex(request_id), 17, 4), substr(hex(request_id), 21))) AS request_id,
    tenant_id, thread_id, idempotency_key, status, decision, execution, closed, payload, comment,
    strftime('%Y-%m-%dT%H:%M:%S', created_at / 1000000, 'unixepoch') || format('.%06dZ', created_at % 1000000) AS created_at,
    strftime('%Y-%m-%dT%H:%M:%S', decided_at / 1000000, 'unixepoch') || format('.%06dZ', decided_at % 1000000) AS decided_at
FROM action;
