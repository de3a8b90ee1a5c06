-- What the scripts on accounts share: reading the account, limits, writing it back, the journal.
-- The rules are those of tidemill.billing.ledger_limits; layout.py says what lies where.
-- Numbers are exact: all stay below 2^53, or are compared with something that does.
local SCALE, DAY_MS, MAX_NANO = 60000, 86400000, 9007199254740991

local function exact(number)
  return string.format('%d', number)
end

local function read_scope(name, limits, use)
  local requests, tokens, concurrency, budget =
    string.match(limits or '- - - -', '^(%S+) (%S+) (%S+) (%S+)$')
  local open, day, used, used_before, requests_level, requests_at, tokens_level, tokens_at =
    string.match(use or '0 0 0 0 - 0 - 0', '^(%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+) (%S+)$')
  return {
    name = name,
    requests_per_minute = tonumber(requests), tokens_per_minute = tonumber(tokens),
    concurrency = tonumber(concurrency), budget = tonumber(budget) or MAX_NANO,
    open = tonumber(open), day = tonumber(day),
    used = tonumber(used), used_before = tonumber(used_before),
    requests_level = tonumber(requests_level), requests_at = tonumber(requests_at),
    tokens_level = tonumber(tokens_level), tokens_at = tonumber(tokens_at),
  }
end

-- The account; [1] is its own scope, [2] that of the key.
local function read_account(name, key_id)
  local key_scope = 'key:' .. key_id
  local found = redis.call('HMGET', name, 'granted', 'topped_up', 'hold', 'journal_ms', 'position',
    'chain', 'tenant:limits', 'tenant:use', key_scope .. ':limits', key_scope .. ':use')
  return {
    granted = tonumber(found[1]) or 0, topped_up = tonumber(found[2]) or 0,
    hold = tonumber(found[3]) or 0, journal_ms = tonumber(found[4]) or 0,
    position = tonumber(found[5]) or 0, chain = found[6] or string.rep('\0', 32),
    read_scope('tenant', found[7], found[8]), read_scope(key_scope, found[9], found[10]),
  }
end

local function use_of(scope)
  return string.format('%d %d %d %d %s %d %s %d',
    scope.open, scope.day, scope.used, scope.used_before,
    scope.requests_level and exact(scope.requests_level) or '-', scope.requests_at,
    scope.tokens_level and exact(scope.tokens_level) or '-', scope.tokens_at)
end

-- Writes balances, the journal's instant, both uses, and what else is given.
local function write_account(name, account, ...)
  redis.call('HSET', name, 'granted', exact(account.granted), 'topped_up', exact(account.topped_up),
    'hold', exact(account.hold), 'journal_ms', exact(account.journal_ms),
    'tenant:use', use_of(account[1]), account[2].name .. ':use', use_of(account[2]), ...)
end

-- The instant of the next entry's id: a clock that steps back must not make XADD fail.
local function next_entry(account, now)
  account.journal_ms = math.max(account.journal_ms, now)
  return exact(account.journal_ms) .. '-*'
end

-- An entry of `moves`, a list of sub-accounts and amounts, less those of 0.
local function append(name, id, kind, subject, now, detail, moves)
  local fields = { 'kind', kind, 'subject', subject, 'at', exact(now) }
  for i = 1, #moves, 2 do
    if moves[i + 1] ~= 0 then
      fields[#fields + 1] = moves[i]
      fields[#fields + 1] = exact(moves[i + 1])
    end
  end
  if detail ~= '' then
    fields[#fields + 1] = 'detail'
    fields[#fields + 1] = detail
  end
  redis.call('XADD', name, id, unpack(fields))
end

local function refilled(level, at, limit, now)
  if not level then
    return limit * SCALE
  end
  return math.min(limit * SCALE, level + math.max(now - at, 0) * limit)
end

local function when_filled(missing, at, limit, now)
  return math.max(now, at) + math.ceil(missing / limit)
end

local function roll(scope, day)
  if day > scope.day then
    scope.used_before = day == scope.day + 1 and scope.used or 0
    scope.used = 0
    scope.day = day
  end
end

local function budget_left(scope, day)
  if day == scope.day then
    return scope.budget - scope.used
  elseif day == scope.day - 1 then
    return scope.budget - scope.used_before
  end
  return MAX_NANO
end

local function spend(scope, day, nano)
  if day == scope.day then
    scope.used = scope.used + nano
  elseif day == scope.day - 1 then
    scope.used_before = scope.used_before + nano
  end
end

local function refused(reason, limit, scope, resets_at, need, available)
  return { 'REFUSED', reason, limit, scope, resets_at, need, available }
end

local function budget_refusal(account, day, need, resets_at)
  for _, scope in ipairs(account) do
    local left = budget_left(scope, day)
    if need > left then
      return refused('BUDGET_EXCEEDED', 'daily_budget_nano', scope.name, resets_at, need,
        math.max(left, 0))
    end
  end
end

local function balance_refusal(account, need)
  local free = account.granted + account.topped_up
  if need > free then
    return refused('INSUFFICIENT_BALANCE', '', 'tenant', 0, need, free)
  end
end

-- Moves `nano` from the balances, granted first, to the hold; what each gave.
local function hold(account, nano)
  local granted = math.min(nano, account.granted)
  account.granted = account.granted - granted
  account.topped_up = account.topped_up - (nano - granted)
  account.hold = account.hold + nano
  return granted, nano - granted
end
