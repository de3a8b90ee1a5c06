-- KEYS: account, operations, journal
-- ARGV: operation id, content, now, amount, balance, counter, kind, detail
-- APPLIED, OTHER_CONTENT or TOO_MUCH; after account.lua and operation.lua.
local account = read_balances(KEYS[1])
local reply = done_before(KEYS[2], ARGV[1], ARGV[2], account)
if reply then
  return reply
end
local now, amount, balance, counter = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6]
if amount > account.room then
  return { 'TOO_MUCH', account.room }
end
account[balance] = account[balance] + amount
local entry = next_entry(account, now)
redis.call('HINCRBY', KEYS[1], counter, exact(-amount))
redis.call('HSET', KEYS[1], balance, exact(account[balance]), 'journal_ms', exact(account.journal_ms))
mark_done(KEYS[2], ARGV[1], ARGV[2], amount)
append(KEYS[3], entry, ARGV[7], ARGV[1], now, ARGV[8], { balance, amount, counter, -amount })
return applied(account, 1, amount)
