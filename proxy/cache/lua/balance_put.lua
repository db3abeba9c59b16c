#!lua
-- Stores the balance that upstream has just reported.
--   KEYS  1 account book
--   ARGV  1 balance
--   reply the store's time in ms
-- Invariant: the newest balance is the one that reached the store last.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], 'balance', ARGV[1], 'balance_at_ms', string.format('%.0f', now))
return now
