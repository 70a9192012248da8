-- Moves reports from a guest's tray to the queue of reports, in one step each with their removal. What a
-- guest writes is believed in nothing: it says neither who it is nor of what form it is.
-- KEYS: meta stream holders wait ids dead sent tray credentials. ARGV: guest reports publish-command
-- Answers how many were moved, and how many are left.
local META, STREAM, IDS, DEAD, TRAY = KEYS[1], KEYS[2], KEYS[5], KEYS[6], KEYS[8]
local MOST, MOST_FIELDS, MOST_BYTES = 64, 1000, 17 * 1024 * 1024
if redis.call('HGET', KEYS[9], ARGV[1]) ~= ARGV[2] then return {0, 0} end
local meta = redis.call('HMGET', META, 'format', 'max', 'hungry', 'consumer')
if not meta[1] then return {0, 0} end
local room = math.huge
if meta[2] and meta[2] ~= '' then room = tonumber(meta[2]) - redis.call('XLEN', STREAM) end

-- Its fields, from whom they are first; and what is wrong with them.
local function read(fields)
  local own, ids, id, bytes = {'from', ARGV[1]}, 0, nil, 0
  for i = 1, #fields, 2 do
    bytes = bytes + #fields[i + 1]
    if fields[i] == 'id' then ids, id = ids + 1, fields[i + 1] end
    if fields[i] ~= 'from' and #own <= MOST_FIELDS then
      own[#own + 1], own[#own + 2] = fields[i], fields[i + 1]
    end
  end
  if #fields > MOST_FIELDS or bytes > MOST_BYTES then
    return {'from', ARGV[1], 'id', ARGV[1], 'kind', 'report', 'body', ''}, nil,
      'a report of ' .. #fields / 2 .. ' fields and ' .. bytes .. ' bytes, which is more than any has'
  end
  if ids ~= 1 or fields[#fields - 1] ~= 'body' then return own, nil, 'not of the form of a report' end
  return own, id
end

local moved, stored, bytes = 0, false, 0
while moved < MOST and room > 0 and bytes < 1024 * 1024 do
  local entry = redis.call('XRANGE', TRAY, '-', '+', 'COUNT', 1)[1]
  if not entry then break end
  local fields, id, wrong = read(entry[2])
  if wrong then
    local n = #fields
    fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = 'reason', wrong, 'attempts', 0
    redis.call('XADD', DEAD, '*', unpack(fields))
  elseif redis.call('SADD', IDS, id) == 1 then
    redis.call('XADD', STREAM, 'NOMKSTREAM', '*', unpack(fields))
    stored, room = true, room - 1
  end
  redis.call('XDEL', TRAY, entry[1])
  moved, bytes = moved + 1, bytes + #fields[#fields]
end
local left = redis.call('XLEN', TRAY)
if left == 0 then redis.call('DEL', TRAY) end
if stored and meta[3] and meta[4] then
  redis.call('HDEL', META, 'hungry')
  redis.call(ARGV[3], STREAM .. ':' .. meta[4], '')
end
return {moved, left}
