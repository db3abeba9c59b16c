#!lua flags=allow-oom
-- Reads an account's book. Creates a missing one.
--   KEYS  1 account book
--   ARGV  1 purge generation for a new book, 2 reprice generation for a new book
--   reply { purge generation, reprice generation, the store's time in ms, ms since the last repricing | nil,
--           balance | nil, age of the balance in ms | nil, number of invalidations }
-- Invariant: a book that was evicted comes back with new generations, so it never brings purged prices back.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local book = redis.call('HMGET', KEYS[1], 'purge', 'reprice', 'repriced_at_ms', 'balance', 'balance_at_ms', 'drops')
if not book[1] or not book[2] then
  redis.call('HSET', KEYS[1], 'purge', ARGV[1], 'reprice', ARGV[2])
  book[1], book[2], book[3] = ARGV[1], ARGV[2], false
end
local repriced = book[3] and now - tonumber(book[3])
local age = book[5] and now - tonumber(book[5])
return { book[1], book[2], now, repriced, book[4], age, tonumber(book[6] or 0) }
