-- KEYS: request, open holds   ARGV: request id, now, lease, owner, ledger up since
-- ORPHANED or NOT_YET.
local now, lease = tonumber(ARGV[2]), tonumber(ARGV[3])
local lease_until = tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]))
if not lease_until or lease_until > now then
  return { 'NOT_YET' }
end
local found = redis.call('HMGET', KEYS[1], 'state', 'fence', 'terms', 'checkpoint', 'attempts',
  'granted', 'topped_up', 'admitted_at', 'orphaned_at', 'first_fence')
local first = found[1] == 'OPEN'
if first and now < tonumber(ARGV[5]) + lease then
  return { 'NOT_YET' }
end
local fence, orphaned_at = found[2] + 1, first and now or tonumber(found[9])
redis.call('HSET', KEYS[1], 'state', 'ORPHAN', 'fence', fence, 'owner', ARGV[4],
  'orphaned_at', string.format('%d', orphaned_at))
redis.call('ZADD', KEYS[2], now + lease, ARGV[1])
return { 'ORPHANED', fence, found[3], found[4], tonumber(found[5]), found[6] + found[7],
  tonumber(found[8]), orphaned_at, tonumber(found[10]) }
