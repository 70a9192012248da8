-- Ends deliveries. ARGV: token epoch lease-ms mode publish-command acks, then the acks' entries, their
-- messages' ids, and for each other settlement: kind entry count argument
-- Answers one letter for each other settlement: 1 done, 0 no longer this token's.
local token, mode, acks = ARGV[1], ARGV[4], tonumber(ARGV[6])
local meta = redis.call('HMGET', META, 'epoch', 'consumer', 'limit', 'hungry')
if meta[1] ~= ARGV[2] then return {'gone'} end
-- While a token is among the holders nobody but its owner touches what it has pending (C4).
if not redis.call('ZSCORE', HOLDERS, token) then return {'lost'} end
local at, limit = now(), tonumber(meta[3])
even_without_memory()
if ARGV[3] ~= '0' then redis.call('ZADD', HOLDERS, at + tonumber(ARGV[3]), token) end
if acks > 0 then
  redis.call('XACK', STREAM, GROUP, unpack(ARGV, 7, 6 + acks))
  redis.call('XDEL', STREAM, unpack(ARGV, 7, 6 + acks))
  redis.call('SREM', IDS, unpack(ARGV, 7 + acks, 6 + 2 * acks))
end
local codes, waits = {}, false
for i = 7 + 2 * acks, #ARGV, 4 do
  local kind, id, count = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local pending = redis.call('XPENDING', STREAM, GROUP, id, id, 1, token)[1]
  if pending and pending[4] == count then
    if kind == 'retry' then
      local delay = tonumber(ARGV[i + 3])
      -- Rounded up: not before (C6).
      if put_back(id, count, limit, delay > 0 and at + delay + 1 or 0) then waits = true end
    elseif kind == 'uncounted' then
      -- Never handed out: the count is as it was before the claim (C9, F8).
      put_back(id, count - 1, math.huge, 0)
      waits = true
    else
      bury(id, count, ARGV[i + 3])
    end
    codes[#codes + 1] = '1'
  else
    codes[#codes + 1] = '0'
  end
end
if mode ~= '' and meta[2] == token then
  redis.call('HDEL', META, 'consumer', 'hungry')
  meta[2] = false
end
if mode == 'release' and release(token, limit) then waits = true end
if waits and meta[2] and meta[4] then
  redis.call('HDEL', META, 'hungry')
  redis.call(ARGV[5], STREAM .. ':' .. meta[2], '')
end
return {'ok', table.concat(codes)}
