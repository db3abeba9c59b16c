#!lua flags=no-writes
-- Reads rates and counters at one moment of the server's clock. Amounts are returned as stored text, which is exact.
--   KEYS  rates, then counters
--   ARGV  1 number of rates
--   reply { now in µs, the TAT in µs of each rate | nil, { requests | nil, credits | nil } of each counter }
local time = redis.call('TIME')
local reply = { string.format('%.0f', time[1] * 1000000 + time[2]) }
for i = 1, #KEYS do
  if i <= tonumber(ARGV[1]) then
    reply[i + 1] = redis.call('GET', KEYS[i])
  else
    reply[i + 1] = redis.call('HMGET', KEYS[i], 'requests', 'credits')
  end
end
return reply
