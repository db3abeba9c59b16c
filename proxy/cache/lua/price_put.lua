#!lua
-- Stores a price, if the caller holds the question's lease, and ends the lease.
--   KEYS  1 price, 2 lease
--   ARGV  1 the caller's token, 2 encoding, 3 encoded price, 4 lifetime of the price in ms
--   reply { the store's time in ms, 1 if this replaced another price that was still fresh, else 0,
--           body digest and estimate of the price that this replaced, in the same encoding | nil, nil },
--         or 0 if the caller no longer holds the lease
-- Invariant: an answer never replaces one that was requested later, and one requested before a purge is not stored.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('GET', KEYS[2]) ~= 'L ' .. ARGV[1] then
  return 0
end
local function differs(before, new)
  local put_at, ttl, generations, price = string.match(before, '^%S+ (%d+) (%d+) (%S+ %S+) %S+ (.*)$')
  local new_generations, new_price = string.match(new, '^%d+ (%S+ %S+) %S+ (.*)$')
  return put_at and now < put_at + ttl and generations == new_generations and price ~= new_price
end
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2] .. ' ' .. string.format('%.0f', now) .. ' ' .. ARGV[3], 'PX', ARGV[4])
redis.call('DEL', KEYS[2])
local encoding, digest, estimated = string.match(before or '', '^(%S+) %d+ %d+ %S+ %S+ (%S+) (%S+)')
local is_known = encoding == ARGV[2]
return { now, before and differs(before, ARGV[3]) and 1 or 0, is_known and digest, is_known and estimated }
