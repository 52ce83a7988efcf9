-- The checks use OR: for an IN of three or more values SQLite builds a temporary table on every
-- insert.
CREATE TABLE action (
    id              INTEGER PRIMARY KEY,
    -- A UUIDv7, so that new ids are neighbours in the index.
    request_id      BLOB NOT NULL UNIQUE CHECK (length(request_id) = 16),
    -- The first 16 bytes of SHA-256 over tenant, thread and key, each behind a byte with its length.
    identity        BLOB NOT NULL UNIQUE CHECK (length(identity) = 16),
    tenant_id       TEXT NOT NULL,
    thread_id       TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    status          TEXT NOT NULL CHECK (status = 'PENDING' OR status = 'COMMITTED' OR status = 'FAILED'),
    decision        TEXT CHECK (decision = 'approve' OR decision = 'reject'),
    execution       TEXT CHECK (execution = 'claimed' OR execution = 'completed' OR execution = 'failed'
                        OR execution = 'unknown'),
    closed          TEXT CHECK (closed = 'expired' OR closed = 'cancelled'),
    -- SHA-256 of the payload's canonical form.
    digest          BLOB CHECK (length(digest) = 32),
    payload         TEXT,
    comment         TEXT,
    -- The X-Request-Id of the call that decided: 16 bytes if it is a UUID, else text.
    call_id         ANY,
    -- Times are microseconds since 1970, UTC.
    created_at      INTEGER NOT NULL,
    decided_at      INTEGER,
    CHECK ((status = 'PENDING') = (decision IS NULL)),
    CHECK ((decision IS NULL) = (decided_at IS NULL)),
    CHECK ((payload IS NULL) = (digest IS NULL)),
    CHECK (status <> 'FAILED' OR decision = 'approve'),
    CHECK (execution IS NULL OR decision = 'approve'),
    CHECK (closed IS NULL OR decision IS NOT NULL)
) STRICT;

-- One row for each transition of an action: both the event to deliver and the audit trail. Rows are
-- only appended; a deliverer keeps its own cursor. When old rows are removed, the newest must stay,
-- so that no sequence number is used twice. (AUTOINCREMENT would ensure that too, but rewrites a row
-- of a second table for each event.)
CREATE TABLE event (
    seq         INTEGER PRIMARY KEY,
    event_id    BLOB NOT NULL CHECK (length(event_id) = 16),
    at          INTEGER NOT NULL,
    actor       TEXT NOT NULL,
    -- The requested operation: submit, approve or reject.
    verb        TEXT NOT NULL,
    action      INTEGER NOT NULL REFERENCES action (id),
    from_status TEXT,
    to_status   TEXT NOT NULL,
    decision    TEXT,
    execution   TEXT,
    -- The X-Request-Id of the call.
    call_id     ANY
) STRICT;

-- For a status by call id. Only UUIDs are looked up.
CREATE INDEX event_call ON event (call_id) WHERE typeof(call_id) = 'blob';

-- One row, rewritten to show that a write is durable.
CREATE TABLE heartbeat (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    at INTEGER NOT NULL
) STRICT;

-- For people to read: ids and times are text.
CREATE VIEW readable_action AS
SELECT
    lower(format('%s-%s-%s-%s-%s', substr(hex(request_id), 1, 8), substr(hex(request_id), 9, 4),
        substr(hex(request_id), 13, 4), substr(hex(request_id), 17, 4), substr(hex(request_id), 21))) AS request_id,
    tenant_id, thread_id, idempotency_key, status, decision, execution, closed, payload, comment,
    strftime('%Y-%m-%dT%H:%M:%S', created_at / 1000000, 'unixepoch') || format('.%06dZ', created_at % 1000000) AS created_at,
    strftime('%Y-%m-%dT%H:%M:%S', decided_at / 1000000, 'unixepoch') || format('.%06dZ', decided_at % 1000000) AS decided_at
FROM action;
