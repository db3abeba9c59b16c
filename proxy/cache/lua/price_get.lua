#!lua flags=no-writes
-- Reads a price, and the store's time, from which its age is computed.
--   KEYS  1 price
--   reply { text of the price | nil, the store's time in ms }
local time = redis.call('TIME')
return { redis.call('GET', KEYS[1]), time[1] * 1000 + math.floor(time[2] / 1000) }
