-- What stays of an action that was removed: enough to answer whoever asks for it again, so that no
-- key is decided twice. Nothing that people or agents wrote, and no names.
CREATE TABLE tombstone (
    -- As the action had it.
    identity      BLOB PRIMARY KEY CHECK (length(identity) = 16),
    request_id    BLOB NOT NULL CHECK (length(request_id) = 16),
    decision      TEXT NOT NULL CHECK (decision = 'approve' OR decision = 'reject'),
    execution     TEXT CHECK (execution = 'completed'),
    closed        TEXT CHECK (closed = 'expired' OR closed = 'cancelled'),
    digest        BLOB CHECK (length(digest) = 32),
    edited_digest BLOB CHECK (length(edited_digest) = 32),
    created_at    INTEGER NOT NULL,
    decided_at    INTEGER NOT NULL,
    CHECK (execution IS NULL OR decision = 'approve'),
    CHECK (closed IS NULL OR decision = 'reject')
) STRICT, WITHOUT ROWID;

-- One row: the position up to which events were looked at, and the number of tombstones. An action
-- is judged at its newest event, so no event has to be looked at twice.
CREATE TABLE sweep (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    position   INTEGER NOT NULL,
    tombstones INTEGER NOT NULL
) STRICT;

INSERT INTO sweep (id, position, tombstones) VALUES (1, 0, 0);

-- The exceptions: newest events of actions that are over and had to stay, each with the time at
-- which it is looked at again.
CREATE TABLE postponed (
    until INTEGER NOT NULL,
    event INTEGER NOT NULL,
    PRIMARY KEY (until, event)
) STRICT, WITHOUT ROWID;

-- When the last server that delivered to the endpoint left it. NULL while one delivers.
ALTER TABLE endpoint ADD COLUMN left_at INTEGER;

UPDATE endpoint SET left_at = CAST(unixepoch('subsec') * 1000000 AS INTEGER) WHERE holder IS NULL;
