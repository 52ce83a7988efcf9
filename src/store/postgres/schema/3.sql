-- Retention. The row of an action that was removed stays, stripped, as its tombstone: only the unique
-- index of `action` makes who decides at the same moment wait for one another, so the identity must
-- stay in it. Nothing that people or agents wrote is left, and no names.
--
-- A server of version 2 beside it answers a removed key alike, from the same row. By its id it still
-- shows what is left, and its lists are slower. Nothing that it writes makes such an action anything
-- else: the constraint refuses a claim.

ALTER TABLE action ADD COLUMN removed_at timestamptz;

-- What was run is compared by digest, for ever.
ALTER TABLE action
    DROP CONSTRAINT action_check2,
    DROP CONSTRAINT action_check3,
    ADD CONSTRAINT action_payload CHECK (removed_at IS NOT NULL OR
        (payload IS NULL) = (digest IS NULL) AND (edited_payload IS NULL) = (edited_digest IS NULL)),
    ADD CONSTRAINT action_removed CHECK (removed_at IS NULL OR status = 'COMMITTED'
        AND (execution IS NULL OR execution = 'completed')
        AND num_nonnulls(payload, edited_payload, comment, title, expires_at, allow_edit, submitted_by,
                         decided_by, result, reason, call_id) = 0);

-- Lists meet no tombstones, however many there are.
CREATE INDEX action_listed ON action (tenant_id, state, request_id) WHERE removed_at IS NULL;
DROP INDEX action_state;

-- The positions of an action's events, which go with it.
CREATE INDEX feed_action ON feed (tenant_id, request_id);

-- One row: the position up to which events were looked at, and the number of tombstones. An action
-- is judged at its newest event, so no event has to be looked at twice. Who sweeps has the row locked.
CREATE TABLE sweep (
    id         smallint PRIMARY KEY CHECK (id = 1),
    position   bigint NOT NULL,
    tombstones bigint NOT NULL
);

INSERT INTO sweep VALUES (1, 0, 0);

-- The exceptions: newest events of actions that had to stay, each with the time at which it is looked
-- at again.
CREATE TABLE postponed (
    until    timestamptz NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (until, position)
);

-- The positions of the events that sweeps removed, for good. What is missing and not here was not
-- removed by a sweep.
CREATE TABLE swept (
    position bigint PRIMARY KEY
);

-- When the last server that delivered to the endpoint left it. NULL while one delivers.
ALTER TABLE endpoint ADD COLUMN left_at timestamptz;

UPDATE endpoint SET left_at = clock_timestamp() WHERE holder IS NULL;

-- A server of version 2 does not say when it leaves, and the time that another one left there must not
-- count as its own.
CREATE FUNCTION aegis_endpoint_left() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.left_at := clock_timestamp();
    RETURN NEW;
END $$;

CREATE TRIGGER endpoint_left BEFORE UPDATE ON endpoint FOR EACH ROW
    WHEN (NEW.holder IS NULL AND NEW.left_at IS NOT DISTINCT FROM OLD.left_at
          AND (OLD.holder IS NOT NULL OR NEW.stopped_at IS DISTINCT FROM OLD.stopped_at))
    EXECUTE FUNCTION aegis_endpoint_left();
