-- Takes a queue's one place (C12). ARGV: token lease-ms
local token = ARGV[1]
local meta = redis.call('HMGET', META, 'epoch', 'consumer', 'limit')
if not meta[1] then return {'none'} end
local at = now()
local other = meta[2]
if other and other ~= token then
  local ends = redis.call('ZSCORE', HOLDERS, other)
  if ends and tonumber(ends) > at then return {'taken'} end
end
even_without_memory()
sweep(at, token, tonumber(meta[3]))
redis.call('HSET', META, 'consumer', token)
redis.call('HDEL', META, 'hungry')
redis.call('ZADD', HOLDERS, at + tonumber(ARGV[2]), token)
return {'ok', meta[1]}
