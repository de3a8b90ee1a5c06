-- What settling and releasing share.

-- The owner may end a hold; an orphan also those who had it before: they know what was generated.
local function may_end(request, callers)
  return (request.state == 'OPEN' and callers == request.fence)
    or (request.state == 'ORPHAN' and request.first_fence <= callers and callers <= request.fence)
end

-- Ends the hold of `request`: charges `amount`, granted first, and frees the rest; a place is free,
-- and `unused` tokens go back to the buckets they came from. What each balance was charged.
local function end_hold(account, request, amount, unused, now)
  local held = request.granted + request.topped_up
  local granted = math.min(amount, request.granted)
  account.granted = account.granted + request.granted - granted
  account.topped_up = account.topped_up + request.topped_up - (amount - granted)
  account.hold = account.hold - held
  for _, scope in ipairs(account) do
    scope.open = scope.open - 1
    spend(scope, request.day, amount - held)
    local limit = scope.tokens_per_minute
    if limit and string.find(request.tokens_taken, ' ' .. scope.name .. ' ', 1, true) then
      local level = refilled(scope.tokens_level, scope.tokens_at, limit, now) + unused * SCALE
      scope.tokens_level = math.min(level, limit * SCALE)
      scope.tokens_at = math.max(scope.tokens_at, now)
    end
  end
  return granted, amount - granted
end

-- The fields of a request that ending it needs.
local function read_request(name)
  local found = redis.call('HMGET', name, 'state', 'fence', 'granted', 'topped_up', 'day', 'tokens',
    'tokens_taken', 'key_id', 'first_fence')
  return {
    state = found[1] or 'UNKNOWN', fence = tonumber(found[2]) or 0,
    granted = tonumber(found[3]), topped_up = tonumber(found[4]), day = tonumber(found[5]),
    tokens = tonumber(found[6]), tokens_taken = found[7], key_id = found[8],
    first_fence = tonumber(found[9]),
  }
end
