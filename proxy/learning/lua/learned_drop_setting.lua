#!lua
-- Drops the price of one setting. An answer that was asked before is not learned from.
--   KEYS  1 account's learned state, 2 scope
--   ARGV  1 setting's id
--   reply 1, or 0 if the scope is unknown
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local epoch = redis.call('HMGET', KEYS[1], 'epoch')[1]
if not epoch or redis.call('EXISTS', KEYS[2]) == 0 then
  return 0
end
local setting = cjson.encode({ epoch = epoch, since = now + 1, bodies = {} })
redis.call('HSET', KEYS[2], 's:' .. ARGV[1], string.format('%.0f ', now) .. setting)
return 1
