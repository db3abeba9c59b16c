#!lua
-- Stores a price, fenced: only the holder of the lease may, so that an answer that is older than another one, or was
-- asked before a purge, never replaces or revives anything.
--   KEYS  1 price, 2 lease
--   ARGV  1 our token, 2 encoding, 3 encoded price, 4 lifetime in ms
--   reply 0 the lease was not ours any more | now in ms
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
if redis.call('GET', KEYS[2]) ~= 'L ' .. ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[2] .. ' ' .. now .. ' ' .. ARGV[3], 'PX', ARGV[4])
redis.call('DEL', KEYS[2])
return tonumber(now)
