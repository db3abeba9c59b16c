#!lua flags=allow-oom
-- Forgets all prices of an account: they were asked under another nonce.
--   KEYS  1 book
--   ARGV  1 a fresh nonce for purge, 2 a fresh nonce for reprice
--   reply 1
redis.call('HSET', KEYS[1], 'purge', ARGV[1], 'reprice', ARGV[2])
redis.call('HDEL', KEYS[1], 'repriced_at_ms')
return 1
