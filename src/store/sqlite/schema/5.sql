-- For the age of the oldest action that waits for a decision, and of the oldest that waits for an
-- executor. An action that was decided without a submission enters neither.
CREATE INDEX action_pending ON action (created_at) WHERE status = 'PENDING';
CREATE INDEX action_unclaimed ON action (decided_at)
    WHERE status = 'COMMITTED' AND decision = 'approve' AND execution IS NULL AND submitted_by IS NOT NULL;
