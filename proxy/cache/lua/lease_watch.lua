#!lua flags=no-writes
-- Reads a question's price and lease at one moment, for a follower.
--   KEYS  1 price, 2 lease
--   reply { text of the price | nil, text of the lease | nil, the store's time in ms }
local time = redis.call('TIME')
return { redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2]), time[1] * 1000 + math.floor(time[2] / 1000) }
