#!lua
-- Counts what became of inferred prices. `unchecked` are the answers since a test agreed,
-- the list moved, or a contradiction was found.
--   KEYS  1 scope
--   ARGV  1 answered, 2 right, 3 wrong
--   reply 1, or 0 if the scope is gone
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HINCRBY', KEYS[1], 'answered', ARGV[1])
redis.call('HINCRBY', KEYS[1], 'unchecked', ARGV[1])
redis.call('HINCRBY', KEYS[1], 'right', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'wrong', ARGV[3])
return 1
