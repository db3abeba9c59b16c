#!lua
-- Checks that the server accepts writes to these keys. It writes nothing, but has no `no-writes` flag, so the server
-- refuses it whenever it refuses writes: out of memory, a replica, too few replicas, a failed save, or no permission.
--   KEYS  any number, all in one slot
--   ARGV  none
--   reply 1
return 1
