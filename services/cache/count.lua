-- Adds a batch of counters once, however often it is sent.
-- KEYS[1] statistics hash; ARGV[1] sender's field; ARGV[2] batch number, rising from 1;
-- ARGV[3..] field and increment in turn. Returns 1 if the batch was added, 0 if it had been.
local last = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
if tonumber(ARGV[2]) <= last then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
for i = 3, #ARGV, 2 do
  redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
end
return 1
