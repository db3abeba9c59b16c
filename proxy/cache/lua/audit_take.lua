#!lua
-- Decides which process asks for a fresh balance: one at a time in the fleet.
--   KEYS  1 book
--   ARGV  1 age in ms from which a balance is old, 2 ms for which nobody else asks
--   reply 1 it is for the caller to ask | 0
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local book = redis.call('HMGET', KEYS[1], 'balance_at_ms', 'audit_until_ms')
if book[1] and now - tonumber(book[1]) < tonumber(ARGV[1]) then
  return 0
end
if book[2] and now < tonumber(book[2]) then
  return 0
end
redis.call('HSET', KEYS[1], 'audit_until_ms', string.format('%.0f', now + tonumber(ARGV[2])))
return 1
