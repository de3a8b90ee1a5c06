-- KEYS: account, request, journal
-- ARGV: request id, fence, now, add, checkpoint
-- EXTENDED, REFUSED or STALE; after account.lua.
local fence, now, add = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local found = redis.call('HMGET', KEYS[2], 'state', 'fence', 'granted', 'topped_up', 'day', 'key_id')
local state = found[1] or 'UNKNOWN'
if (state ~= 'OPEN' and state ~= 'ORPHAN') or tonumber(found[2]) ~= fence then
  return { 'STALE', tonumber(found[2]) or 0, state }
end
local account, day = read_account(KEYS[1], found[6]), tonumber(found[5])
local refusal = budget_refusal(account, day, add, 0) or balance_refusal(account, add)
if refusal then
  redis.call('HSET', KEYS[2], 'checkpoint', ARGV[5])
  return refusal
end
for _, scope in ipairs(account) do
  spend(scope, day, add)
end
local granted, topped_up = hold(account, add)
local of_granted, of_topped_up = found[3] + granted, found[4] + topped_up
local entry = next_entry(account, now)
write_account(KEYS[1], account)
redis.call('HSET', KEYS[2], 'checkpoint', ARGV[5], 'granted', exact(of_granted),
  'topped_up', exact(of_topped_up))
append(KEYS[3], entry, 'extend', ARGV[1], now, '',
  { 'granted', -granted, 'topped_up', -topped_up, 'hold', add })
return { 'EXTENDED', of_granted + of_topped_up }
