-- KEYS[1] tm:key:<key id>
-- 1: revoked now; 0: it was revoked before; -1: no such key.
local revoked = redis.call('HGET', KEYS[1], 'revoked')
if not revoked then
  return -1
end
if revoked == '1' then
  return 0
end
redis.call('HSET', KEYS[1], 'revoked', '1')
return 1
