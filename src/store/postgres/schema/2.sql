-- For counting the dead letters of an endpoint, and for listing them.
CREATE INDEX undelivered_dead ON undelivered (endpoint, position) WHERE given_up_at IS NOT NULL;
