-- One row if an embedded database was moved here, or is being moved. Until it is finished no server
-- serves from here.
CREATE TABLE import (
    id          smallint PRIMARY KEY CHECK (id = 1),
    -- The move, which the embedded database knows too.
    move        uuid NOT NULL,
    -- The path of the embedded database, for people.
    source      text NOT NULL,
    begun_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The number of the table that is being filled, and how many of its rows are here.
    stage       integer NOT NULL DEFAULT 0,
    copied      bigint NOT NULL DEFAULT 0,
    finished_at timestamptz
);

-- What stays of actions that were removed from an embedded database before it was moved here. That
-- database has no texts of their identities, so no row of `action` can keep them. Only a move into an
-- empty database writes rows; so whoever finds none needs no lock on what is not there.
CREATE TABLE tombstone (
    -- The first 8 bytes of SHA-256 over tenant and thread, then those over tenant, thread and key, each
    -- text behind a byte with its length.
    identity      bytea PRIMARY KEY CHECK (length(identity) = 16),
    request_id    uuid NOT NULL,
    decision      text NOT NULL CHECK (decision IN ('approve', 'reject')),
    execution     text CHECK (execution = 'completed'),
    closed        text CHECK (closed IN ('expired', 'cancelled')),
    digest        bytea CHECK (length(digest) = 32),
    edited_digest bytea CHECK (length(edited_digest) = 32),
    created_at    timestamptz NOT NULL,
    decided_at    timestamptz NOT NULL
);
