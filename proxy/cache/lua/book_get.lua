#!lua flags=allow-oom
-- An account's book: its nonces and its balance. A book that is not there is made, with new nonces: whatever was
-- stored before is then older than the book, so an evicted book never brings purged prices back.
--   KEYS  1 book
--   ARGV  1 a fresh nonce for purge, 2 a fresh nonce for reprice
--   reply { purge, reprice, now in ms, ms since the last repricing | nil, balance | nil, its age in ms | nil, drops }
--         where drops counts the questions that were purged, or have got another price early
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
