#!lua
-- Records that a price has changed.
--   KEYS  1 price changes of a day
--   ARGV  1 id of the change, 2 the change as text, 3 most changes that a day keeps, 4 expiry in ms
--   reply 1, or 0 if the day keeps no more
-- Invariant: a change whose reply was lost can be recorded again, because it has the same id. Only one that is counted
-- and not kept is then counted twice.
if redis.call('HMGET', KEYS[1], ARGV[1])[1] then
  return 1
end
local found = redis.call('HINCRBY', KEYS[1], 'found', 1)
if found == 1 then
  redis.call('PEXPIREAT', KEYS[1], ARGV[4])
end
if found > tonumber(ARGV[3]) then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
