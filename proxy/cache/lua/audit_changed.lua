#!lua
-- Records that an audit found another price for a question. If enough questions changed lately, the price list is taken
-- for changed: the account gets a new reprice generation, which makes all older prices stale.
--   KEYS  1 account book
--   ARGV  1 the question's key, 2 number of changed questions that reprices the account, 3 ms within which they count,
--         4 least ms between two repricings, 5 the new reprice generation
--   reply 1 if the account was repriced, else 0
-- Invariant: the number of changes in the book is bounded, because an account is audited only a few times a minute, and
-- changes older than ARGV 3 are deleted.
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
