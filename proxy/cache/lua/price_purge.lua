#!lua
-- Forgets one question: its price, and the lease of whoever is asking for it, whose answer then stays out.
--   KEYS  1 price, 2 lease
--   reply 1 | 0 there was no price
redis.call('DEL', KEYS[2])
return redis.call('DEL', KEYS[1])
