#!lua
-- Renews the caller's lease.
--   KEYS  1 lease
--   ARGV  1 the caller's token, 2 lifetime in ms from now
--   reply 1, or 0 if the caller no longer holds the lease
if redis.call('GET', KEYS[1]) ~= 'L ' .. ARGV[1] then
  return 0
end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
