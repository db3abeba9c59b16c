#!lua
-- Does nothing. The server refuses it whenever it refuses writes: it is full, a replica, or without its replicas or its
-- disk; or this user must not use these keys.
--   KEYS  any of one slot
-- Replies 1.
return 1
