#!lua flags=no-writes
-- Reads usage.
--   KEYS  usage hashes, one for each team and day
--   ARGV  none
--   reply for each key a list of fields and amounts, alternating
local usage = {}
for i = 1, #KEYS do
  usage[i] = redis.call('HGETALL', KEYS[i])
end
return usage
