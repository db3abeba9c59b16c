#!lua
-- Claims the account's next audit for the caller, if the balance is old.
--   KEYS  1 account book
--   ARGV  1 age in ms from which a balance is old, 2 lifetime of the claim in ms
--   reply 1 if the caller has the claim, else 0
-- Invariant: at most one process has a claim that has not expired.
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
