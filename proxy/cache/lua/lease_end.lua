#!lua
-- Ends the caller's lease without a price.
--   KEYS  1 price, 2 lease
--   ARGV  1 the caller's token, 2 failure for followers ('' for none), 3 lifetime of the failure in ms,
--         4 '1' to delete the stored price too
--   reply 1, or 0 if the caller no longer holds the lease; then nothing is changed
if redis.call('GET', KEYS[2]) ~= 'L ' .. ARGV[1] then
  return 0
end
if ARGV[4] == '1' then
  redis.call('DEL', KEYS[1])
end
if ARGV[2] == '' then
  redis.call('DEL', KEYS[2])
else
  redis.call('SET', KEYS[2], 'F ' .. ARGV[1] .. ' ' .. ARGV[2], 'PX', ARGV[3])
end
return 1
