-- For counting the dead letters of an endpoint, and for listing them.
CREATE INDEX undelivered_dead ON undelivered (endpoint, event) WHERE given_up_at IS NOT NULL;

-- The positions of the events that sweeps removed, for good. What is missing and not here was not
-- removed by a sweep.
CREATE TABLE swept (
    event INTEGER PRIMARY KEY
) STRICT;

-- Up to here, the version before removed events and did not write down which.
ALTER TABLE sweep ADD COLUMN unmarked INTEGER NOT NULL DEFAULT 0;

UPDATE sweep SET unmarked = (SELECT coalesce(max(event), 0) FROM chain) WHERE tombstones > 0;
