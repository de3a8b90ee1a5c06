-- KEYS: request   ARGV: fence, attempts, checkpoint
-- DONE or STALE.
local found = redis.call('HMGET', KEYS[1], 'state', 'fence')
local state = found[1] or 'UNKNOWN'
if (state ~= 'OPEN' and state ~= 'ORPHAN') or found[2] ~= ARGV[1] then
  return { 'STALE', tonumber(found[2]) or 0, state }
end
redis.call('HSET', KEYS[1], 'attempts', ARGV[2], 'checkpoint', ARGV[3])
return { 'DONE' }
