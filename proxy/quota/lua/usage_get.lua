#!lua flags=no-writes
-- Usage as it stands.
--   KEYS  usage of a team on a day, any number of them
--   reply a list a key: its fields and their amounts, in turn
local usage = {}
for i = 1, #KEYS do
  usage[i] = redis.call('HGETALL', KEYS[i])
end
return usage
