#!lua flags=allow-oom
-- Purges all prices of an account, by new generations. The prices themselves stay in the store until they expire.
--   KEYS  1 account book
--   ARGV  1 the new purge generation, 2 the new reprice generation
--   reply 1
redis.call('HSET', KEYS[1], 'purge', ARGV[1], 'reprice', ARGV[2])
redis.call('HDEL', KEYS[1], 'repriced_at_ms')
return 1
