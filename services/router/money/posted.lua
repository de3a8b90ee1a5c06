-- The reply for a request that was settled before.
local function posted_before(name)
  local found = redis.call('HMGET', name, 'position', 'previous_chain', 'chain', 'granted',
    'topped_up', 'held', 'record')
  return { 'POSTED', tonumber(found[1]), found[2], found[3], tonumber(found[4]), tonumber(found[5]),
    tonumber(found[6]), 1, found[7] }
end
