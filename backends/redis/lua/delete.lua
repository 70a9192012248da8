-- Deletes a queue: one step against every settlement, publish and claim (Q6).
-- ARGV: discard most-ids publish-command
local META, STREAM, DEAD = KEYS[1], KEYS[2], KEYS[6]
local meta = redis.call('HMGET', META, 'format', 'consumer')
if not meta[1] then return {'none'} end
local waiting, dead = redis.call('XLEN', STREAM), redis.call('XLEN', DEAD)
if waiting + dead > 0 and ARGV[1] == '0' then return {'full', waiting + dead} end
local ids = {}
for _, entry in ipairs(redis.call('XRANGE', STREAM, '-', '+', 'COUNT', ARGV[2])) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'id' then ids[#ids + 1] = entry[2][i + 1] end
  end
end
redis.call('UNLINK', unpack(KEYS))
if meta[2] then redis.call(ARGV[3], STREAM .. ':' .. meta[2], '') end
return {'ok', waiting + dead, ids}
