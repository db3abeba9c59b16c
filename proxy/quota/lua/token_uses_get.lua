#!lua flags=no-writes
-- Reads when tokens were last used.
--   KEYS  one for each token
--   ARGV  none
--   reply for each key the beginning of an hour in s, or nil
local hours = {}
for i = 1, #KEYS do
  hours[i] = redis.call('GET', KEYS[i])
end
return hours
