#!lua flags=no-writes
-- An account's newest balance and its age.
--   KEYS  1 book
--   reply { balance | nil, age in ms | nil }
local book = redis.call('HMGET', KEYS[1], 'balance', 'balance_at_ms')
if not book[1] or not book[2] then
  return { false, false }
end
local time = redis.call('TIME')
return { book[1], time[1] * 1000 + math.floor(time[2] / 1000) - tonumber(book[2]) }
