-- KEYS: account, request, open holds, journal
-- ARGV: request id, key id, body, owner, now, lease, full, least, tokens, terms, ledger up since
-- HELD, REFUSED, IN_PROGRESS, OTHER_BODY or POSTED; after account.lua and posted.lua.
local key_id, owner, terms = ARGV[2], ARGV[4], ARGV[10]
local now, lease, full, least, tokens = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]),
  tonumber(ARGV[8]), tonumber(ARGV[9])

local known = redis.call('HMGET', KEYS[2], 'state', 'body', 'fence')
local state, fence = known[1], tonumber(known[3]) or 0
if state and known[2] ~= ARGV[3] then
  return { 'OTHER_BODY' }
elseif state == 'SETTLED' then
  return posted_before(KEYS[2])
elseif state == 'OPEN' or state == 'ORPHAN' then
  local kept_until = tonumber(redis.call('ZSCORE', KEYS[3], ARGV[1]))
  if state == 'OPEN' then
    kept_until = math.max(kept_until, tonumber(ARGV[11]) + lease)
  end
  if kept_until > now then
    return { 'IN_PROGRESS', kept_until }
  end
  local found = redis.call('HMGET', KEYS[2], 'granted', 'topped_up', 'in_full', 'admitted_at',
    'terms', 'checkpoint', 'attempts', 'first_fence')
  redis.call('HSET', KEYS[2], 'state', 'OPEN', 'fence', fence + 1, 'owner', owner, 'orphaned_at', 0)
  redis.call('ZADD', KEYS[3], now + lease, ARGV[1])
  return { 'HELD', fence + 1, found[1] + found[2], tonumber(found[3]), tonumber(found[4]), found[5],
    found[6], tonumber(found[7]), tonumber(found[8]) }
end

local account = read_account(KEYS[1], key_id)
local day = math.max(math.floor(now / DAY_MS), account[1].day)
for _, scope in ipairs(account) do
  roll(scope, day)
end

for _, scope in ipairs(account) do
  local limit = scope.requests_per_minute
  if limit then
    scope.requests_level = refilled(scope.requests_level, scope.requests_at, limit, now)
    if scope.requests_level < SCALE then
      local resets_at = when_filled(SCALE - scope.requests_level, scope.requests_at, limit, now)
      return refused('RATE_LIMITED', 'requests_per_minute', scope.name, resets_at, 0, 0)
    end
    scope.requests_level = scope.requests_level - SCALE
    scope.requests_at = math.max(scope.requests_at, now)
  end
end
local tokens_taken = ' '
for _, scope in ipairs(account) do
  local limit = scope.tokens_per_minute
  if limit then
    local need = math.min(tokens, limit) * SCALE
    scope.tokens_level = refilled(scope.tokens_level, scope.tokens_at, limit, now)
    if scope.tokens_level < need then
      local resets_at = when_filled(need - scope.tokens_level, scope.tokens_at, limit, now)
      return refused('RATE_LIMITED', 'tokens_per_minute', scope.name, resets_at, 0, 0)
    end
    scope.tokens_level = scope.tokens_level - tokens * SCALE
    scope.tokens_at = math.max(scope.tokens_at, now)
    tokens_taken = tokens_taken .. scope.name .. ' '
  end
end
for _, scope in ipairs(account) do
  if scope.concurrency and scope.open >= scope.concurrency then
    return refused('CONCURRENCY_LIMITED', 'concurrency', scope.name, 0, 0, 0)
  end
end
local room = math.min(account.granted + account.topped_up, budget_left(account[1], day),
  budget_left(account[2], day))
local amount = full <= room and full or least
local refusal = budget_refusal(account, day, amount, (day + 1) * DAY_MS)
  or balance_refusal(account, amount)
if refusal then
  return refusal
end

for _, scope in ipairs(account) do
  scope.open = scope.open + 1
  spend(scope, day, amount)
end
local granted, topped_up = hold(account, amount)
local entry = next_entry(account, now)
local in_full = amount == full and 1 or 0
write_account(KEYS[1], account)
redis.call('HSET', KEYS[2], 'state', 'OPEN', 'fence', fence + 1, 'owner', owner, 'key_id', key_id,
  'body', ARGV[3], 'admitted_at', ARGV[5], 'day', day, 'in_full', in_full, 'tokens', ARGV[9],
  'tokens_taken', tokens_taken, 'granted', exact(granted), 'topped_up', exact(topped_up),
  'terms', terms, 'checkpoint', '', 'attempts', 0, 'orphaned_at', 0, 'first_fence', fence + 1)
redis.call('ZADD', KEYS[3], now + lease, ARGV[1])
append(KEYS[4], entry, 'reserve', ARGV[1], now, '',
  { 'granted', -granted, 'topped_up', -topped_up, 'hold', amount })
return { 'HELD', fence + 1, amount, in_full, now, terms, '', 0, fence + 1 }
