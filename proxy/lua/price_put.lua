#!lua
-- Stores a price behind the server's time, until it expires.
--   KEYS  1 price
--   ARGV  1 encoded price, 2 lifetime in ms
--   reply 1
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('SET', KEYS[1], now .. ' ' .. ARGV[1], 'PX', ARGV[2])
return 1
