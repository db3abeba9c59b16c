#!lua flags=allow-oom
-- Counts an invalidation: a question of the account was purged or got another price. Processes that see another count
-- read the account's cached prices from the store again.
--   KEYS  1 account book
--   reply 1
-- A missing book is not created: its next reader gives it new generations, which invalidates all cached prices too.
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HINCRBY', KEYS[1], 'drops', 1)
end
return 1
