-- Renews a lease and takes what is ready, up to `want`, in the queue's order.
-- ARGV: token epoch lease-ms renew want most-bytes
local token, want, most = ARGV[1], tonumber(ARGV[5]), tonumber(ARGV[6])
local meta = redis.call('HMGET', META, 'epoch', 'consumer', 'limit', 'hungry')
if meta[1] ~= ARGV[2] then return {'gone'} end
if meta[2] ~= token or not redis.call('ZSCORE', HOLDERS, token) then return {'taken'} end
local at, limit = now(), tonumber(meta[3])
even_without_memory()
if ARGV[4] == '1' then
  redis.call('ZADD', HOLDERS, at + tonumber(ARGV[3]), token)
  sweep(at, token, limit)
end
local claimed, bytes = {}, 0
-- Those that come again stand before those that never came (C11).
while #claimed < want and bytes < most do
  local members = redis.call('ZRANGEBYSCORE', WAIT, '-inf', at, 'LIMIT', 0, math.min(want - #claimed, 64))
  if #members == 0 then break end
  for _, member in ipairs(members) do
    local id = unpad(member)
    local pending = redis.call('XPENDING', STREAM, GROUP, id, id, 1)[1]
    redis.call('ZREM', WAIT, member)
    if pending and pending[4] >= limit then
      over_the_limit(id, pending[4])
    elseif pending then
      local count = pending[4] + 1
      local entry = redis.call('XCLAIM', STREAM, GROUP, token, 0, id, 'RETRYCOUNT', count)[1]
      if entry then
        claimed[#claimed + 1] = {entry[1], entry[2], count}
        bytes = bytes + #entry[2][#entry[2]]
      end
    end
  end
end
local more = bytes >= most
while #claimed < want and not more do
  local count = math.min(want - #claimed, 64)
  local read = redis.call('XREADGROUP', 'GROUP', GROUP, token, 'COUNT', count, 'STREAMS', STREAM, '>')
  if not read then break end
  local entries = read[1][2]
  for _, entry in ipairs(entries) do
    claimed[#claimed + 1] = entry
    bytes = bytes + #entry[2][#entry[2]]
  end
  if #entries < count then break end
  more = bytes >= most
end
if want == 0 then
  -- Only the lease was kept.
elseif #claimed < want and not more then
  if not meta[4] then redis.call('HSET', META, 'hungry', '1') end
elseif meta[4] then
  redis.call('HDEL', META, 'hungry')
end
local due = -1
local first = redis.call('ZRANGE', WAIT, 0, 0, 'WITHSCORES')
if first[2] then due = math.max(0, tonumber(first[2]) - at) end
return {'ok', claimed, due, more and 1 or 0}
