#!lua
-- Ends a lease that brought no price: leaves word for those who wait, or just gives it back.
--   KEYS  1 price, 2 lease
--   ARGV  1 our token, 2 word ('' for none), 3 lifetime of the word in ms, 4 '1' to end the stored price too
--   reply 1 | 0 it was not ours any more, and nothing was done
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
