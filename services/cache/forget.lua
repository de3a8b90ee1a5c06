-- Deletes an index entry unless another node, or a later life of this one, has written it since.
-- KEYS[1] entry; ARGV[1] what follows the entry's fixed fields: epoch and node id.
-- Returns 1 if the entry is gone, else 0.
local entry = redis.call('GET', KEYS[1])
if entry and string.sub(entry, -#ARGV[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  return 1
end
return 0
