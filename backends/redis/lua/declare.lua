-- Makes a queue. KEYS: meta stream holders wait ids dead sent. ARGV: limit max epoch
local META, STREAM = KEYS[1], KEYS[2]
local meta = redis.call('HMGET', META, 'format', 'limit', 'max', 'epoch')
if meta[1] then
  -- What somebody made lossy or of another sort is told, never used (Q3).
  local odd = {}
  if meta[1] ~= '1' then odd[#odd + 1] = 'format is ' .. meta[1] .. ', this release knows 1' end
  for _, key in ipairs(KEYS) do
    if redis.call('PTTL', key) >= 0 then odd[#odd + 1] = key .. ' expires, and a queue must not' end
  end
  local kind = redis.call('TYPE', STREAM).ok
  local group = false
  if kind == 'stream' then
    for _, info in ipairs(redis.call('XINFO', 'GROUPS', STREAM)) do
      if info[2] == 'wilco' then group = true end
    end
  end
  if not group then odd[#odd + 1] = STREAM .. ' is no stream with the group wilco, but ' .. kind end
  return {'there', meta[2], meta[3], odd, meta[4]}
end
for i = 2, #KEYS do
  if redis.call('EXISTS', KEYS[i]) == 1 then
    return {'there', '', '', {KEYS[i] .. ' is there, and the queue is not: remove what is not wilco\'s'}}
  end
end
redis.call('HSET', META, 'format', '1', 'limit', ARGV[1], 'max', ARGV[2], 'epoch', ARGV[3])
-- From 0, so that what was published before the first consumer ever came is delivered (C13).
redis.call('XGROUP', 'CREATE', STREAM, 'wilco', '0', 'MKSTREAM')
return {'made'}
