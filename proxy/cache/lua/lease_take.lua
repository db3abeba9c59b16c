#!lua
-- Takes the lease of a question, unless there is a price that the caller has not seen, or another holder.
--   KEYS  1 price, 2 lease
--   ARGV  1 the caller's token, 2 lifetime of the lease in ms, 3 put_at_ms of the price that the caller has seen
--         ('' for none), 4 '1' to take the lease in any case
--   reply { 'price', text of the price, the store's time in ms }
--         { 'wait', the holder's token, the store's time in ms }
--         { 'lead', the caller's token, the store's time in ms }
-- Invariant: a lease has one holder. It is 'L <token>' while the holder asks upstream, and 'F <token> <failure>' for a
-- short time after the holder got no price; a failure does not keep the lease from being taken.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if ARGV[4] ~= '1' then
  local price = redis.call('GET', KEYS[1])
  local put_at = price and string.match(price, '^%d+ (%d+) ')
  if put_at and put_at ~= ARGV[3] then
    return { 'price', price, now }
  end
  local lease = redis.call('GET', KEYS[2])
  if lease and string.sub(lease, 1, 2) == 'L ' then
    return { 'wait', string.sub(lease, 3), now }
  end
end
redis.call('SET', KEYS[2], 'L ' .. ARGV[1], 'PX', ARGV[2])
return { 'lead', ARGV[1], now }
