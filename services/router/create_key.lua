-- KEYS[1] tm:tenant:<id>  KEYS[2] tm:key:<key id>  KEYS[3] tm:keys (all ids)  KEYS[4] tm:keys:<tenant>
-- ARGV: key id, tenant id, digest, label, created_at_ms
-- 1: made; 0: no such tenant; -1: the key id is taken.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
if redis.call('EXISTS', KEYS[2]) == 1 then
  return -1
end
redis.call('HSET', KEYS[2], 'tenant', ARGV[2], 'digest', ARGV[3], 'label', ARGV[4],
  'created_at_ms', ARGV[5], 'revoked', '0')
redis.call('ZADD', KEYS[3], 0, ARGV[1])
redis.call('ZADD', KEYS[4], 0, ARGV[1])
return 1
