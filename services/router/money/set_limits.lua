-- KEYS: account, operations   ARGV: operation id, content, scope, limits
-- APPLIED or OTHER_CONTENT; after operation.lua.
local account = read_balances(KEYS[1])
local reply = done_before(KEYS[2], ARGV[1], ARGV[2], account)
if reply then
  return reply
end
redis.call('HSET', KEYS[1], ARGV[3] .. ':limits', ARGV[4])
mark_done(KEYS[2], ARGV[1], ARGV[2], 0)
return applied(account, 1, 0)
