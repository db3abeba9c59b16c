#!lua flags=allow-oom
-- Notes that a question of the account has been purged, or has another price: whoever remembers its price asks the
-- store again.
--   KEYS  1 book
--   reply 1
-- A book that is not there gets new nonces when it is next read, which does the same.
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HINCRBY', KEYS[1], 'drops', 1)
end
return 1
