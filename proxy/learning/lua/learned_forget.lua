#!lua flags=allow-oom
-- Forgets a scope and its doubt; or deletes a scope that has made room for another. Its doubt then stays, and expires.
--   KEYS  1 account's learned state, 2 scope
--   ARGV  1 scope's id, 2 '1' to delete it only if the account does not list it
--   reply 1, or 0 if there was none
local listed, doubts = unpack(redis.call('HMGET', KEYS[1], 'scope:' .. ARGV[1], 'doubts'))
if ARGV[2] == '1' then
  return listed and 0 or redis.call('DEL', KEYS[2])
end
local kept = {}
for name, deadline in string.gmatch(doubts or '', '(%S+):(%d+)') do
  if name ~= ARGV[1] then
    kept[#kept + 1] = name .. ':' .. deadline
  end
end
if doubts then
  redis.call('HSET', KEYS[1], 'doubts', table.concat(kept, ' '))
end
redis.call('HDEL', KEYS[1], 'scope:' .. ARGV[1])
return redis.call('DEL', KEYS[2])
