#!lua
-- Notes that a body's price has changed. When enough distinct bodies have within an hour, the price list has: the
-- reprice nonce is renewed, at most once in a while, and every older price is stale.
--   KEYS  1 book
--   ARGV  1 the question's key, 2 how many make a change of the list, 3 within how many ms,
--         4 ms between two repricings, 5 a fresh nonce
--   reply 1 repriced | 0
-- The book is bounded: an account is audited a few times a minute at the most, and old changes go.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local book = redis.call('HGETALL', KEYS[1])
local changes, repriced_at = { ['changed:' .. ARGV[1]] = true }, nil
local count, old = 1, {}
for i = 1, #book, 2 do
  local name, value = book[i], tonumber(book[i + 1])
  if name == 'repriced_at_ms' then
    repriced_at = value
  elseif string.sub(name, 1, 8) == 'changed:' and not changes[name] then
    if now - value > tonumber(ARGV[3]) then
      old[#old + 1] = name
    else
      changes[name] = true
      count = count + 1
    end
  end
end
local recently = repriced_at and now - repriced_at < tonumber(ARGV[4])
local due = count >= tonumber(ARGV[2]) and not recently
if due then
  for name in pairs(changes) do
    old[#old + 1] = name
  end
end
redis.call('HSET', KEYS[1], 'changed:' .. ARGV[1], string.format('%.0f', now))
if #old > 0 then
  redis.call('HDEL', KEYS[1], unpack(old))
end
if not due then
  return 0
end
redis.call('HSET', KEYS[1], 'reprice', ARGV[5], 'repriced_at_ms', string.format('%.0f', now))
return 1
