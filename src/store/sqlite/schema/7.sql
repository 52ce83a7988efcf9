-- What was submitted or decided on, as of this event: the digest of the action's payload. The
-- action's own changes with an edit. (No CHECK: adding one would read every row.)
ALTER TABLE event ADD COLUMN digest BLOB;

-- The events of each tenant as a hash chain. A row holds a run of links, so that many events
-- at once cost little more than one.
CREATE TABLE chain (
    -- The position (event.seq) of the last event. It is no reference: the event may be removed.
    event     INTEGER PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    -- The number of the last link in the tenant's chain. The first has number 1.
    seq       INTEGER NOT NULL,
    -- For each link the position of its event, 8 bytes with the highest first, and its leaf, 32
    -- bytes.
    links     BLOB NOT NULL CHECK (length(links) > 0 AND length(links) % 40 = 0),
    -- The hash of the last link.
    hash      BLOB NOT NULL CHECK (length(hash) = 32),
    UNIQUE (tenant_id, seq)
) STRICT;
