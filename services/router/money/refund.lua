-- KEYS: account, operations, journal, request
-- ARGV: operation id, content, now, amount or "" for all, note, detail
-- APPLIED, OTHER_CONTENT, TOO_MUCH or NOT_SETTLED; after account.lua and operation.lua.
local account = read_balances(KEYS[1])
local reply = done_before(KEYS[2], ARGV[1], ARGV[2], account)
if reply then
  return reply
end
local found = redis.call('HMGET', KEYS[4], 'state', 'granted', 'topped_up', 'refunded')
if found[1] ~= 'SETTLED' then
  return { 'NOT_SETTLED', found[1] or 'UNKNOWN' }
end
local paid_in, before, now = tonumber(found[3]), tonumber(found[4]), tonumber(ARGV[3])
local left = found[2] + paid_in - before
local amount, most = tonumber(ARGV[4]) or left, math.min(left, account.room)
if amount > most or amount == 0 then
  return { 'TOO_MUCH', most }
end
-- What was paid from the topped-up balance goes back first.
local topped_up = math.min(before + amount, paid_in) - math.min(before, paid_in)
account.topped_up = account.topped_up + topped_up
account.granted = account.granted + amount - topped_up
local entry = next_entry(account, now)
redis.call('HINCRBY', KEYS[1], 'revenue', exact(-amount))
redis.call('HSET', KEYS[1], 'granted', exact(account.granted),
  'topped_up', exact(account.topped_up), 'journal_ms', exact(account.journal_ms))
redis.call('HSET', KEYS[4], 'refunded', exact(before + amount), 'refund:' .. ARGV[1],
  exact(before) .. ' ' .. exact(amount) .. ' ' .. ARGV[3] .. ' ' .. ARGV[5])
mark_done(KEYS[2], ARGV[1], ARGV[2], amount)
append(KEYS[3], entry, 'refund', ARGV[1], now, ARGV[6],
  { 'revenue', -amount, 'topped_up', topped_up, 'granted', amount - topped_up })
return applied(account, 1, amount)
