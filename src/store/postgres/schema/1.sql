-- Every key is led by the tenant, so that an engine that shards by tenant needs nothing else. The
-- tables of the delivery (feed, endpoint, undelivered) are about all tenants.
--
-- Names are compared byte by byte (collation "C"). In free text U+0000, which PostgreSQL cannot
-- keep, is written as U+2400 '0', and U+2400 as U+2400 twice.

CREATE TABLE action (
    tenant_id       text COLLATE "C" NOT NULL,
    -- A UUIDv7 whose first 60 free bits are the time: lists are in this order.
    request_id      uuid NOT NULL,
    thread_id       text COLLATE "C" NOT NULL,
    idempotency_key text COLLATE "C" NOT NULL,
    status          text NOT NULL CHECK (status IN ('PENDING', 'COMMITTED', 'FAILED')),
    decision        text CHECK (decision IN ('approve', 'reject')),
    execution       text CHECK (execution IN ('claimed', 'completed', 'failed', 'unknown')),
    closed          text CHECK (closed IN ('expired', 'cancelled')),
    -- SHA-256 of the canonical form of the payload as it was submitted.
    digest          bytea CHECK (length(digest) = 32),
    payload         text,
    -- The payload as the reviewer edited it, which is then what is run.
    edited_digest   bytea CHECK (length(edited_digest) = 32),
    edited_payload  text,
    comment         text,
    title           text,
    expires_at      timestamptz,
    allow_edit      boolean,
    -- Owners of credentials, or 'system:' and what acted.
    submitted_by    text,
    decided_by      text,
    -- What the claimant reported: JSON with a success, text with a failure.
    result          text,
    reason          text,
    -- The X-Request-Id of the call that decided; a UUID in its usual form.
    call_id         text COLLATE "C",
    created_at      timestamptz NOT NULL,
    decided_at      timestamptz,
    -- The number of its events.
    events          integer NOT NULL,
    -- What lists filter by, as one number.
    state           smallint NOT NULL GENERATED ALWAYS AS (
        CASE status
            WHEN 'PENDING' THEN 1
            WHEN 'COMMITTED' THEN
                CASE WHEN decision = 'reject' THEN 5
                     WHEN execution IS NULL THEN 2
                     WHEN execution = 'claimed' THEN 3
                     ELSE 4 END
            ELSE CASE execution WHEN 'failed' THEN 6 ELSE 7 END
        END) STORED,
    PRIMARY KEY (tenant_id, request_id),
    CONSTRAINT action_identity UNIQUE (tenant_id, thread_id, idempotency_key),
    CHECK ((status = 'PENDING') = (decision IS NULL)),
    CHECK ((decision IS NULL) = (decided_at IS NULL)),
    CHECK ((payload IS NULL) = (digest IS NULL)),
    CHECK ((edited_payload IS NULL) = (edited_digest IS NULL)),
    CHECK (status <> 'FAILED' OR decision = 'approve'),
    CHECK (execution IS NULL OR decision = 'approve'),
    CHECK (closed IS NULL OR decision = 'reject')
);

CREATE INDEX action_state ON action (tenant_id, state, request_id);
-- For a status without a tenant.
CREATE INDEX action_request ON action (request_id);
CREATE INDEX action_expiry ON action (expires_at) WHERE status = 'PENDING' AND expires_at IS NOT NULL;
-- For the ages of the oldest.
CREATE INDEX action_pending ON action (created_at) WHERE status = 'PENDING';
CREATE INDEX action_unclaimed ON action (decided_at)
    WHERE status = 'COMMITTED' AND decision = 'approve' AND execution IS NULL AND submitted_by IS NOT NULL;

-- The newest claim on an action. It is live while it has an end.
CREATE TABLE claim (
    tenant_id  text COLLATE "C" NOT NULL,
    request_id uuid NOT NULL,
    token      uuid NOT NULL,
    fence      bigint NOT NULL,
    until      timestamptz,
    actor      text NOT NULL,
    call_id    text COLLATE "C",
    PRIMARY KEY (tenant_id, request_id)
);

CREATE INDEX claim_until ON claim (until) WHERE until IS NOT NULL;

-- One row for each transition of an action: both the event to deliver and the audit trail. Rows are
-- only appended.
CREATE TABLE event (
    tenant_id   text COLLATE "C" NOT NULL,
    request_id  uuid NOT NULL,
    -- 1 and up, without a gap within an action.
    number      integer NOT NULL,
    at          timestamptz NOT NULL,
    event_id    uuid NOT NULL,
    actor       text NOT NULL,
    kind        text NOT NULL,
    from_status text,
    to_status   text NOT NULL,
    decision    text,
    execution   text,
    call_id     text COLLATE "C",
    -- The transaction that appended it, and the epoch of the cluster in which that number holds.
    epoch       integer NOT NULL,
    xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),
    PRIMARY KEY (tenant_id, request_id, number, at)
) PARTITION BY RANGE (at);

CREATE INDEX event_xid ON event (epoch, xid);
CREATE INDEX event_call ON event (call_id) WHERE call_id IS NOT NULL;

-- For times that no partition was made for.
CREATE TABLE event_default PARTITION OF event DEFAULT;

-- The order of all events. Whoever publishes fills it in one transaction at a time, so positions have no
-- gap, and none appears behind another that was read.
CREATE TABLE feed (
    position   bigint PRIMARY KEY,
    tenant_id  text COLLATE "C" NOT NULL,
    request_id uuid NOT NULL,
    number     integer NOT NULL,
    at         timestamptz NOT NULL,
    event_id   uuid NOT NULL
);

CREATE INDEX feed_tenant ON feed (tenant_id, position);

-- One row. What the snapshot sees is in the feed.
CREATE TABLE publisher (
    id       smallint PRIMARY KEY CHECK (id = 1),
    position bigint NOT NULL,
    snapshot pg_snapshot NOT NULL
);

INSERT INTO publisher VALUES (1, 0, pg_current_snapshot());

-- One row. Numbers of transactions start anew when the database is restored into another cluster,
-- which is then another epoch.
CREATE TABLE cluster (
    id         smallint PRIMARY KEY CHECK (id = 1),
    identifier bigint NOT NULL,
    epoch      integer NOT NULL
);

INSERT INTO cluster SELECT 1, system_identifier, 1 FROM pg_control_system();

-- A webhook endpoint: how far it has read the events, and who delivers to it.
CREATE TABLE endpoint (
    name       text COLLATE "C" PRIMARY KEY,
    position   bigint NOT NULL,
    holder     uuid,
    held_until timestamptz,
    stopped_at timestamptz,
    CHECK ((holder IS NULL) = (held_until IS NULL))
);

-- The events that an endpoint has not received. One with neither a due time nor a time of giving up
-- waits behind an earlier one of the same action. With a time of giving up it is a dead letter.
CREATE TABLE undelivered (
    endpoint    text COLLATE "C" NOT NULL,
    position    bigint NOT NULL,
    tenant_id   text COLLATE "C" NOT NULL,
    request_id  uuid NOT NULL,
    parked_at   timestamptz NOT NULL,
    attempts    integer NOT NULL,
    due         timestamptz,
    given_up_at timestamptz,
    failure     text,
    PRIMARY KEY (endpoint, position),
    CHECK (due IS NULL OR given_up_at IS NULL)
);

CREATE INDEX undelivered_due ON undelivered (endpoint, due) WHERE due IS NOT NULL;
CREATE INDEX undelivered_action ON undelivered (tenant_id, request_id);

-- One row for each server, rewritten to show that a write is durable.
CREATE TABLE heartbeat (
    server uuid PRIMARY KEY,
    at     timestamptz NOT NULL
);
