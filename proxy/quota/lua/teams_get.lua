#!lua flags=no-writes
-- Reads the teams that ever had usage.
--   KEYS  1 set of teams
--   ARGV  none
--   reply a list of team ids
return redis.call('SMEMBERS', KEYS[1])
