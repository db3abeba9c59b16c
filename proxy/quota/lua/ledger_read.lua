#!lua flags=no-writes
-- How rates and counters stand, and the server's clock. Amounts are the texts that the server keeps: exact.
--   KEYS  rates, then counters
--   ARGV  1 number of rates
--   reply { now in µs, what each rate holds | nil, { requests | nil, credits | nil } a counter }
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
