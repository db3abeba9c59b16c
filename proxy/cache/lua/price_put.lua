#!lua
-- Stores a price, fenced: only the holder of the lease may, so that an answer that is older than another one, or was
-- asked before a purge, never replaces or revives anything.
--   KEYS  1 price, 2 lease
--   ARGV  1 our token, 2 encoding, 3 encoded price, 4 lifetime in ms
--   reply 0 the lease was not ours any more | { now in ms, 1 if another price that is still fresh stood there }
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('GET', KEYS[2]) ~= 'L ' .. ARGV[1] then
  return 0
end
local function differs(before, new)
  local put_at, ttl, nonces, price = string.match(before, '^%S+ (%d+) (%d+) (%S+ %S+) %S+ (.*)$')
  local new_nonces, new_price = string.match(new, '^%d+ (%S+ %S+) %S+ (.*)$')
  return put_at and now < put_at + ttl and nonces == new_nonces and price ~= new_price
end
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2] .. ' ' .. string.format('%.0f', now) .. ' ' .. ARGV[3], 'PX', ARGV[4])
redis.call('DEL', KEYS[2])
return { now, before and differs(before, ARGV[3]) and 1 or 0 }
