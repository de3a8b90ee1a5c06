-- Keeps an hour's first and last report of each start of a worker, whoever writes in which order.
-- KEYS: the hour. ARGV, over and over: "<worker id>:<epoch>", first and last report seen (JSON).
-- Uptimes are microseconds below 2^53, exact as Lua's numbers; the texts are kept as they came.
local function uptime(text)
  return cjson.decode(text).uptime_us
end

local function keep(field, text, better)
  local held = redis.call('HGET', KEYS[1], field)
  if not held or better(uptime(text), uptime(held)) then
    redis.call('HSET', KEYS[1], field, text)
  end
end

for i = 1, #ARGV, 3 do
  keep(ARGV[i] .. ':first', ARGV[i + 1], function(ours, held) return ours < held end)
  keep(ARGV[i] .. ':last', ARGV[i + 2], function(ours, held) return ours > held end)
end
