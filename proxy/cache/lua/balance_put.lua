#!lua
-- Remembers the balance that upstream has just shown; the server's order of arrival decides which is the newest.
--   KEYS  1 book
--   ARGV  1 balance
--   reply now in ms
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'balance', ARGV[1], 'balance_at_ms', string.format('%.0f', now))
return now
