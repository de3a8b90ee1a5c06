-- KEYS[1] tm:tenant:<id>   ARGV: currency, salt, created_at_ms
-- 1: made; 0: exists with this content; -1: exists with another.
local currency = redis.call('HGET', KEYS[1], 'currency')
if not currency then
  redis.call('HSET', KEYS[1], 'currency', ARGV[1], 'salt', ARGV[2], 'created_at_ms', ARGV[3])
  return 1
end
if currency == ARGV[1] then
  return 0
end
return -1
