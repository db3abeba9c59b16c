#!lua flags=no-writes
-- What became of a question that somebody else is asking.
--   KEYS  1 price, 2 lease
--   reply { price's text | nil, lease's text | nil, now in ms }
local time = redis.call('TIME')
return { redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2]), time[1] * 1000 + math.floor(time[2] / 1000) }
