-- What was submitted or decided on, as of this event: the digest of the action's payload. The
-- action's own changes with an edit. Servers of the release before leave it empty, as do all events
-- from before this schema. (No CHECK: adding one would read every row.)
ALTER TABLE event ADD COLUMN digest bytea;

-- The events of each tenant as a hash chain. A row holds a run of links, so that many events
-- at once cost little more than one.
CREATE TABLE chain (
    tenant_id text COLLATE "C" NOT NULL,
    -- The number of the last link in the tenant's chain. The first has number 1.
    seq       bigint NOT NULL,
    -- The position of the last event. It is no reference: the event may be removed.
    position  bigint NOT NULL,
    -- For each link the position of its event, 8 bytes with the highest first, and its leaf, 32
    -- bytes.
    links     bytea NOT NULL CHECK (length(links) > 0 AND length(links) % 40 = 0),
    -- The hash of the last link.
    hash      bytea NOT NULL CHECK (length(hash) = 32),
    PRIMARY KEY (tenant_id, seq)
);

-- Hashes cannot be compressed.
ALTER TABLE chain ALTER COLUMN links SET STORAGE EXTERNAL;

-- One row, locked by the server that chains: the position up to which all events are chained.
CREATE TABLE chainer (
    id       smallint PRIMARY KEY CHECK (id = 1),
    position bigint NOT NULL
);

INSERT INTO chainer VALUES (1, 0);
