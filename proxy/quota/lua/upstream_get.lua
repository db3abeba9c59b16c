#!lua flags=no-writes
-- Reads how many requests upstream answered on each day, and how long they took.
--   KEYS  one for each day
--   ARGV  none
--   reply for each key { calls | nil, µs | nil }
local days = {}
for i = 1, #KEYS do
  days[i] = redis.call('HMGET', KEYS[i], 'calls', 'us')
end
return days
