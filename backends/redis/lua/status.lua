-- What a queue holds; changes nothing (Q2).
local meta = redis.call('HMGET', META, 'format', 'consumer')
if not meta[1] then return {} end
local at = now()
local alive, in_flight = {}, 0
for _, token in ipairs(redis.call('ZRANGEBYSCORE', HOLDERS, '(' .. at, '+inf', 'LIMIT', 0, 1000)) do alive[token] = true end
for _, one in ipairs(redis.call('XPENDING', STREAM, GROUP)[4] or {}) do
  if alive[one[1]] then in_flight = in_flight + tonumber(one[2]) end
end
local delayed = redis.call('ZCOUNT', WAIT, '(' .. at, '+inf')
local consumers = meta[2] and alive[meta[2]] and 1 or 0
return {redis.call('XLEN', STREAM), delayed, in_flight, redis.call('XLEN', DEAD), consumers}
