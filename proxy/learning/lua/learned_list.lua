#!lua flags=no-writes
-- Lists the scopes of an account.
--   KEYS  1 account's learned state
--   reply { id, ... }, the last used first
local scopes = {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local id = string.match(all[i], '^scope:(.*)$')
  if id then
    scopes[#scopes + 1] = { tonumber(string.match(all[i + 1], '^%d+')), id }
  end
end
table.sort(scopes, function(a, b) return a[1] > b[1] or a[1] == b[1] and a[2] < b[2] end)
for i = 1, #scopes do
  scopes[i] = scopes[i][2]
end
return scopes
