-- The checks use OR: for an IN of three or more values SQLite builds a temporary table on every
-- insert.
CREATE TABLE action (
    id              INTEGER PRIMARY KEY,
    -- A UUIDv7, so that new ids are neighbours in the index.
    request_id      BLOB NOT NULL UNIQUE CHECK (length(request_id) = 16),
    -- The first 8 bytes of SHA-256 over tenant and thread, then those over tenant, thread and key, each text
    -- behind a byte with its length.
    identity        BLOB NOT NULL UNIQUE CHECK (length(identity) = 16),
    tenant_id       TEXT NOT NULL,
    thread_id       TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,
    status          TEXT NOT NULL CHECK (status = 'PENDING' OR status = 'COMMITTED' OR status = 'FAILED'),
    decision        TEXT CHECK (decision = 'approve' OR decision = 'reject'),
    execution       TEXT CHECK (execution = 'claimed' OR execution = 'completed' OR execution = 'failed'
                        OR execution = 'unknown'),
    closed          TEXT CHECK (closed = 'expired' OR closed = 'cancelled'),
    -- SHA-256 of the canonical form of the payload as it was submitted.
    digest          BLOB CHECK (length(digest) = 32),
    payload         TEXT,
    -- The payload as the reviewer edited it, which is then what is run.
    edited_digest   BLOB CHECK (length(edited_digest) = 32),
    edited_payload  TEXT,
    comment         TEXT,
    -- What the submission says.
    title           TEXT,
    expires_at      INTEGER,
    allow_edit      INTEGER CHECK (allow_edit = 0 OR allow_edit = 1),
    -- Owners of credentials, or 'system:' and what acted.
    submitted_by    TEXT,
    decided_by      TEXT,
    -- What the claimant reported: JSON with a success, text with a failure.
    result          TEXT,
    reason          TEXT,
    -- The X-Request-Id of the call that decided: 16 bytes if it is a UUID, else text.
    call_id         ANY,
    -- Times are microseconds since 1970, UTC.
    created_at      INTEGER NOT NULL,
    decided_at      INTEGER,
    -- What lists filter by, as one number.
    state           INTEGER NOT NULL GENERATED ALWAYS AS (
        CASE status
            WHEN 'PENDING' THEN 1
            WHEN 'COMMITTED' THEN
                CASE WHEN decision = 'reject' THEN 5
                     WHEN execution IS NULL THEN 2
                     WHEN execution = 'claimed' THEN 3
                     ELSE 4 END
            ELSE CASE execution WHEN 'failed' THEN 6 ELSE 7 END
        END) VIRTUAL,
    CHECK ((status = 'PENDING') = (decision IS NULL)),
    CHECK ((decision IS NULL) = (decided_at IS NULL)),
    CHECK ((payload IS NULL) = (digest IS NULL)),
    CHECK ((edited_payload IS NULL) = (edited_digest IS NULL)),
    CHECK (status <> 'FAILED' OR decision = 'approve'),
    CHECK (execution IS NULL OR decision = 'approve'),
    CHECK (closed IS NULL OR decision = 'reject')
) STRICT;

-- For lists. The row's number is the last part of every index, so each state of a tenant is in order.
CREATE INDEX action_state ON action (tenant_id, state);

-- For expiry.
CREATE INDEX action_expiry ON action (expires_at) WHERE status = 'PENDING' AND expires_at IS NOT NULL;

-- The newest claim on an action. It is live while it has an end.
CREATE TABLE claim (
    action  INTEGER PRIMARY KEY REFERENCES action (id),
    token   BLOB NOT NULL CHECK (length(token) = 16),
    fence   INTEGER NOT NULL,
    until   INTEGER,
    actor   TEXT NOT NULL,
    -- The X-Request-Id of the call that claimed: 16 bytes if it is a UUID, else text.
    call_id ANY
) STRICT;

CREATE INDEX claim_until ON claim (until) WHERE until IS NOT NULL;

-- One row for each transition of an action: both the event to deliver and the audit trail. Rows are
-- only appended; a deliverer keeps its own cursor. When old rows are removed, the newest must stay,
-- so that no sequence number is used twice. (AUTOINCREMENT would ensure that too, but rewrites a row
-- of a second table for each event.)
CREATE TABLE event (
    seq         INTEGER PRIMARY KEY,
    event_id    BLOB NOT NULL CHECK (length(event_id) = 16),
    at          INTEGER NOT NULL,
    actor       TEXT NOT NULL,
    -- What happened: submitted, approved, rejected, expired, cancelled, claimed, completed, failed or
    -- claim-lost.
    kind        TEXT NOT NULL,
    tenant_id   TEXT NOT NULL,
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

-- For a tenant's events from a position on, and for the history of an action.
CREATE INDEX event_tenant ON event (tenant_id);
CREATE INDEX event_action ON event (action);

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
    tenant_id, thread_id, idempotency_key, status, decision, closed, execution, title, payload, edited_payload,
    comment, submitted_by, decided_by, result, reason,
    strftime('%Y-%m-%dT%H:%M:%S', expires_at / 1000000, 'unixepoch') || format('.%06dZ', expires_at % 1000000) AS expires_at,
    strftime('%Y-%m-%dT%H:%M:%S', created_at / 1000000, 'unixepoch') || format('.%06dZ', created_at % 1000000) AS created_at,
    strftime('%Y-%m-%dT%H:%M:%S', decided_at / 1000000, 'unixepoch') || format('.%06dZ', decided_at % 1000000) AS decided_at
FROM action;
