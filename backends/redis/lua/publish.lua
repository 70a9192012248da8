-- Stores messages. KEYS: meta stream holders wait ids dead sent.
-- ARGV: publish-command sender turn again, then for each message: id n field value ... (n arguments)
-- Answers one letter a message: s stored, d a duplicate, f full, e an error, whose text follows.
local META, STREAM, IDS, SENT = KEYS[1], KEYS[2], KEYS[5], KEYS[7]
local meta = redis.call('HMGET', META, 'max', 'hungry', 'consumer', 'remember')
if not meta[1] then return {'n'} end
local sender, turn = ARGV[2], ARGV[3]
if ARGV[4] == '1' then
  -- The connection broke before our answer came: if it was done, here is the answer.
  local sent = redis.call('HGET', SENT, sender)
  local was, codes = string.match(sent or '', '^%d+:(%d+):(.*)$')
  if was == turn then return {codes} end
end
local room = math.huge
if meta[1] ~= '' then room = tonumber(meta[1]) - redis.call('XLEN', STREAM) end
local codes, text, stored = {}, nil, false
local i = 5
while i <= #ARGV do
  local id, n = ARGV[i], tonumber(ARGV[i + 1])
  local code
  if room <= 0 then
    -- Full for what is new (Q12), not for what is here already (P3).
    code = redis.call('SISMEMBER', IDS, id) == 1 and 'd' or 'f'
  else
    -- The first write of the script: refused for want of memory, nothing was written at all.
    local added = redis.pcall('SADD', IDS, id)
    if type(added) == 'table' then
      code, text = 'e', added.err
    elseif added == 0 then
      code = 'd'
    else
      local entry = redis.pcall('XADD', STREAM, 'NOMKSTREAM', '*', unpack(ARGV, i + 2, i + 1 + n))
      if type(entry) == 'string' then
        code, stored, room = 's', true, room - 1
      else
        redis.call('SREM', IDS, id)
        code, text = 'e', entry and entry.err or 'ERR the queue\'s stream is gone'
      end
    end
  end
  codes[#codes + 1] = code
  i = i + 2 + n
end
codes = table.concat(codes)
if stored then
  local at = redis.call('TIME')[1]
  redis.call('HSET', SENT, sender, at .. ':' .. turn .. ':' .. codes)
  -- Senders that ended are forgotten once those that are kept have doubled.
  local kept, most = redis.call('HLEN', SENT), tonumber(meta[4] or '256')
  if kept > most then
    local all = redis.call('HGETALL', SENT)
    for k = 1, #all, 2 do
      if tonumber(string.match(all[k + 1], '^%d+')) < at - 3600 then
        redis.call('HDEL', SENT, all[k])
        kept = kept - 1
      end
    end
    redis.call('HSET', META, 'remember', math.max(256, kept * 2))
  end
  if meta[2] and meta[3] then
    redis.call('HDEL', META, 'hungry')
    redis.call(ARGV[1], STREAM .. ':' .. meta[3], '')
  end
end
return {codes, text}
