#!lua
-- Prolongs a lease that is still ours.
--   KEYS  1 lease
--   ARGV  1 our token, 2 lifetime in ms
--   reply 1 | 0 it is not ours any more
if redis.call('GET', KEYS[1]) ~= 'L ' .. ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
