-- One row if the database was moved into another one, or is being moved: no server opens it then.
CREATE TABLE moved (
    id          INTEGER PRIMARY KEY CHECK (id = 1),
    -- The move, which the other database knows too.
    move        BLOB NOT NULL CHECK (length(move) = 16),
    -- The server and the database, without user and password.
    target      TEXT NOT NULL,
    -- With 'copying' the other database cannot be in use. With 'finishing' it may be.
    state       TEXT NOT NULL CHECK (state = 'copying' OR state = 'finishing' OR state = 'finished'),
    begun_at    INTEGER NOT NULL,
    finished_at INTEGER,
    CHECK ((state = 'finished') = (finished_at IS NOT NULL))
) STRICT;
