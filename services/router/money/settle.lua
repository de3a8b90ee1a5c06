-- KEYS: account, request, open holds, journal, receipts
-- ARGV: request id, fence, now, decided at, amount, content (32 bytes), record, total tokens,
--   where the caller thinks the chain ends, and the link that it would add there (32 bytes each)
-- POSTED, ABOVE_HOLD or STALE; after account.lua, ending.lua, posted.lua and sha256.lua.
local request = read_request(KEYS[2])
if request.state == 'SETTLED' then
  return posted_before(KEYS[2])
elseif not may_end(request, tonumber(ARGV[2])) then
  return { 'STALE', request.fence, request.state }
end
local now, amount, held = tonumber(ARGV[3]), tonumber(ARGV[5]), request.granted + request.topped_up
if amount > held then
  return { 'ABOVE_HOLD', held }
end

local account = read_account(KEYS[1], request.key_id)
local unused = math.max(request.tokens - tonumber(ARGV[8]), 0)
local granted, topped_up = end_hold(account, request, amount, unused, now)
local position, previous = account.position + 1, account.chain
local chain = previous == ARGV[9] and ARGV[10] or chain_of(previous, ARGV[6])
local entry = next_entry(account, now)
redis.call('HINCRBY', KEYS[1], 'revenue', exact(amount))
write_account(KEYS[1], account, 'position', exact(position), 'chain', chain)
redis.call('HSET', KEYS[2], 'state', 'SETTLED', 'granted', exact(granted),
  'topped_up', exact(topped_up), 'held', exact(held), 'decided_at', ARGV[4], 'content', ARGV[6],
  'position', exact(position), 'previous_chain', previous, 'chain', chain, 'record', ARGV[7],
  'refunded', 0, 'terms', '', 'checkpoint', '')
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZADD', KEYS[5], ARGV[4], ARGV[1])
append(KEYS[4], entry, 'settle', ARGV[1], now, ARGV[7],
  { 'granted', request.granted - granted, 'topped_up', request.topped_up - topped_up,
    'hold', -held, 'revenue', amount })
return { 'POSTED', position, previous, chain, granted, topped_up, held, 0, ARGV[7] }
