-- Moves one dead letter to the end of its queue, its count at 0 again, in one step (C7).
-- KEYS: meta stream holders wait ids dead sent. ARGV: key publish-command
local META, STREAM, IDS, DEAD = KEYS[1], KEYS[2], KEYS[5], KEYS[6]
local meta = redis.call('HMGET', META, 'max', 'hungry', 'consumer')
if not meta[1] then return {'none'} end
if ARGV[1] == '' then return {'no'} end
local letter = redis.call('XRANGE', DEAD, ARGV[1], ARGV[1])[1]
if not letter then return {'no'} end
if meta[1] ~= '' and redis.call('XLEN', STREAM) >= tonumber(meta[1]) then return {'full'} end
-- The last two fields are those that it got when it died.
local fields, id = {}, nil
for i = 1, #letter[2] - 4, 2 do
  fields[i], fields[i + 1] = letter[2][i], letter[2][i + 1]
  if fields[i] == 'id' then id = fields[i + 1] end
end
if not id then return {'foreign'} end
if redis.call('SADD', IDS, id) == 0 then return {'twice'} end
redis.call('XADD', STREAM, '*', unpack(fields))
redis.call('XDEL', DEAD, ARGV[1])
if meta[2] and meta[3] then
  redis.call('HDEL', META, 'hungry')
  redis.call(ARGV[2], STREAM .. ':' .. meta[3], '')
end
return {'yes'}
