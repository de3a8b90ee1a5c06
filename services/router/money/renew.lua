-- KEYS: open holds, requests   ARGV: owner, lease end, then a request id and a fence for each
-- The ids of those that are no longer the owner's.
local lost = {}
for i = 2, #KEYS do
  local request_id, fence = ARGV[2 * i - 1], ARGV[2 * i]
  local found = redis.call('HMGET', KEYS[i], 'state', 'fence', 'owner')
  if (found[1] == 'OPEN' or found[1] == 'ORPHAN') and found[2] == fence and found[3] == ARGV[1] then
    redis.call('ZADD', KEYS[1], ARGV[2], request_id)
  else
    lost[#lost + 1] = request_id
  end
end
return lost
