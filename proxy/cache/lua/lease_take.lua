#!lua
-- Decides who asks upstream for a question: whoever finds no newer price and nobody asking.
--   KEYS  1 price, 2 lease
--   ARGV  1 our token, 2 lifetime of the lease in ms, 3 when the price we know was put, in ms ('' for none),
--         4 '1' to take the lease from whoever has it
--   reply { 'price', text, now in ms }  somebody has stored another price meanwhile
--         { 'wait', holder's token, now in ms }
--         { 'lead', our token, now in ms }
-- The lease is 'L <token>' while its holder asks, and 'F <token> <word>' for a moment after it got no price.
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
