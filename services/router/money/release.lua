-- KEYS: account, request, open holds, journal
-- ARGV: request id, fence, now, detail
-- RELEASED or STALE; after account.lua and ending.lua.
local request, fence, now = read_request(KEYS[2]), tonumber(ARGV[2]), tonumber(ARGV[3])
if request.state == 'RELEASED' and fence <= request.fence then
  return { 'RELEASED' }
elseif not may_end(request, fence) then
  return { 'STALE', request.fence, request.state }
end
local account = read_account(KEYS[1], request.key_id)
end_hold(account, request, 0, request.tokens, now)
local entry = next_entry(account, now)
write_account(KEYS[1], account)
redis.call('HSET', KEYS[2], 'state', 'RELEASED', 'granted', 0, 'topped_up', 0, 'terms', '',
  'checkpoint', '')
redis.call('ZREM', KEYS[3], ARGV[1])
append(KEYS[4], entry, 'release', ARGV[1], now, ARGV[4], { 'granted', request.granted,
  'topped_up', request.topped_up, 'hold', -(request.granted + request.topped_up) })
return { 'RELEASED' }
