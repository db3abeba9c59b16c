#!lua flags=no-writes
-- Reads what is known about a setting, its scope and its account at one moment.
--   KEYS  1 account's learned state, 2 scope
--   ARGV  1 scope's id, 2 setting's id
--   reply { price epoch | nil, proof id | nil, doubts | nil, last use and team of the scope | nil,
--           head: JSON | nil, members: JSON | nil, answered | nil, right | nil, wrong | nil,
--           setting: '<newest agreeing answer in ms> <JSON>' | nil, the store's time in ms }
local time = redis.call('TIME')
local account = redis.call('HMGET', KEYS[1], 'epoch', 'proof', 'doubts', 'scope:' .. ARGV[1])
local scope = redis.call('HMGET', KEYS[2], 'head', 'members', 'answered', 'right', 'wrong', 's:' .. ARGV[2])
local now = time[1] * 1000 + math.floor(time[2] / 1000)
return { account[1], account[2], account[3], account[4], scope[1], scope[2], scope[3], scope[4], scope[5], scope[6], now }
