#!lua flags=no-writes
-- The teams that have ever had usage.
--   KEYS  1 teams
--   reply a list of their ids
return redis.call('SMEMBERS', KEYS[1])
