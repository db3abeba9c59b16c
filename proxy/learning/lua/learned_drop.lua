#!lua flags=allow-oom
-- Drops the prices of all settings of an account, by a new price epoch. Its doubts were about those prices: they are over.
--   KEYS  1 account's learned state
--   ARGV  1 a new random id
--   reply 1
redis.call('HSET', KEYS[1], 'epoch', ARGV[1], 'doubts', '')
if not redis.call('HMGET', KEYS[1], 'proof')[1] then
  redis.call('HSET', KEYS[1], 'proof', ARGV[1])
end
return 1
