#!lua
-- Purges one question.
--   KEYS  1 price, 2 lease
--   reply 1, or 0 if there was no price
-- Invariant: an answer that was requested before the purge is not stored after it, because its lease is deleted.
redis.call('DEL', KEYS[2])
return redis.call('DEL', KEYS[1])
