#!lua flags=no-writes
-- Reads usage or price changes.
--   KEYS  hashes: usage, one for each team and day, or price changes, one for each day
--   ARGV  none
--   reply for each key a list of fields and values, alternating
local hashes = {}
for i = 1, #KEYS do
  hashes[i] = redis.call('HGETALL', KEYS[i])
end
return hashes
