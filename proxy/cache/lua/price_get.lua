#!lua flags=no-writes
-- A stored price and the server's clock, by which its age is counted.
--   KEYS  1 price
--   reply { text | nil, now in ms }
local time = redis.call('TIME')
return { redis.call('GET', KEYS[1]), time[1] * 1000 + math.floor(time[2] / 1000) }
