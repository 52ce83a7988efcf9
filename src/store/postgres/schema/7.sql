-- What endpoints have not received comes and goes at the front of its index, and a backlog makes the
-- table large: with 200,000 rows autovacuum waits for 40,000 dead ones, and meanwhile looking for what is
-- due takes 3 times as long.
--
-- The tables of one row, or of one for each server or endpoint, need no settings: all of their updates
-- are heap-only, in the one page that they have, and autovacuum looks after 50 dead rows.
ALTER TABLE undelivered SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000);
