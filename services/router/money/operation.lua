-- What operations share: each takes effect once per id. tm:{T}:operations maps the id to the
-- amount that was moved, a space, and the operation's content.

-- The balances, and how much more the account can keep.
local function read_balances(name)
  local found = redis.call('HMGET', name, 'granted', 'topped_up', 'hold', 'journal_ms')
  local account = { granted = tonumber(found[1]) or 0, topped_up = tonumber(found[2]) or 0,
    hold = tonumber(found[3]) or 0, journal_ms = tonumber(found[4]) or 0 }
  account.room = 9007199254740991 - account.granted - account.topped_up - account.hold
  return account
end

local function applied(account, first, amount)
  return { 'APPLIED', first, amount, account.granted, account.topped_up, account.hold }
end

-- The reply to an operation that is known already, else nil.
local function done_before(name, operation_id, content, account)
  local done = redis.call('HGET', name, operation_id)
  if not done then
    return nil
  end
  local amount, before = string.match(done, '^(%d+) (.*)$')
  if before ~= content then
    return { 'OTHER_CONTENT' }
  end
  return applied(account, 0, tonumber(amount))
end

local function mark_done(name, operation_id, content, amount)
  redis.call('HSET', name, operation_id, string.format('%d %s', amount, content))
end
