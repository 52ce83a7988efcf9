-- A webhook endpoint: how far it has read the events, and who delivers to it. An endpoint that is
-- no longer configured keeps its row.
CREATE TABLE endpoint (
    id         INTEGER PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    -- The events up to here are delivered, undelivered (below), or not the endpoint's.
    position   INTEGER NOT NULL,
    -- The server that delivers, and until when it may.
    holder     BLOB CHECK (length(holder) = 16),
    held_until INTEGER,
    -- When the endpoint answered that it is gone.
    stopped_at INTEGER,
    CHECK ((holder IS NULL) = (held_until IS NULL))
) STRICT;

-- The events that an endpoint has not received. One with neither a due time nor a time of giving up
-- waits behind an earlier one of the same action. With a time of giving up it is a dead letter.
CREATE TABLE undelivered (
    endpoint    INTEGER NOT NULL REFERENCES endpoint (id),
    event       INTEGER NOT NULL REFERENCES event (seq) ON DELETE CASCADE,
    action      INTEGER NOT NULL,
    parked_at   INTEGER NOT NULL,
    attempts    INTEGER NOT NULL,
    due         INTEGER,
    given_up_at INTEGER,
    -- The last failure, in words.
    failure     TEXT,
    PRIMARY KEY (endpoint, event),
    CHECK (due IS NULL OR given_up_at IS NULL)
) STRICT, WITHOUT ROWID;

CREATE INDEX undelivered_due ON undelivered (endpoint, due) WHERE due IS NOT NULL;

-- For what is parked of one action.
CREATE INDEX undelivered_action ON undelivered (endpoint, action, event) WHERE given_up_at IS NULL;

-- For removing an event.
CREATE INDEX undelivered_event ON undelivered (event);
