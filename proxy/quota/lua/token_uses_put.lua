#!lua
-- Records when tokens were last used, to the hour.
--   KEYS  one for each token
--   ARGV  1 lifetime of a key in s, then for each token the seconds since its use
--   reply now in s
-- Invariant: a key's hour never decreases. Gateways write in any order, and late after an outage.
local now_s = tonumber(redis.call('TIME')[1])
for i = 1, #KEYS do
  local used_at_s = now_s - tonumber(ARGV[i + 1])
  local hour_s = used_at_s - used_at_s % 3600
  if hour_s > tonumber(redis.call('GET', KEYS[i]) or 0) then
    redis.call('SET', KEYS[i], string.format('%d', hour_s), 'EX', ARGV[1])
  end
end
return now_s
