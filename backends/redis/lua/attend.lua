-- What the scripts of a queue's consumers share. KEYS: meta stream holders wait ids dead sent.
--
-- A message stays in the stream until it is settled. Once delivered it is in the group's pending list:
-- under its holder's token with its exact delivery count, or under '-' while it waits to come again;
-- then it is in `wait` too, by the moment when it may come. `holders` has every token that has, or may
-- have, something pending, by the moment when its lease ends.
local META, STREAM, HOLDERS, WAIT, IDS, DEAD = unpack(KEYS)
local GROUP, NOBODY = 'wilco', '-'
-- Names and values of one entry, of which a message has fewer: a script can pass on some 8,000.
local MOST_FIELDS = 1000

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Ids of entries as text that sorts as they do.
local function pad(id)
  local ms, seq = string.match(id, '^(%d+)-(%d+)$')
  return string.rep('0', 16 - #ms) .. ms .. '-' .. string.rep('0', 12 - #seq) .. seq
end

local function unpad(member)
  local ms, seq = string.match(member, '^0*(%d+)-0*(%d+)$')
  return ms .. '-' .. seq
end

-- A write that takes no memory: after it none of the script is refused for want of memory. Those who
-- consume make room, and a lease that is not renewed is lost.
local function even_without_memory()
  redis.call('ZREM', WAIT, '')
end

local function bury(id, attempts, reason)
  local entry = redis.call('XRANGE', STREAM, id, id)[1]
  redis.call('XACK', STREAM, GROUP, id)
  redis.call('ZREM', WAIT, pad(id))
  if not entry then return end
  local fields = entry[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'id' then redis.call('SREM', IDS, fields[i + 1]) end
  end
  local n = #fields
  if n > MOST_FIELDS then
    reason, n = reason .. ' (of ' .. n / 2 .. ' fields only the first are kept)', MOST_FIELDS
    fields = {unpack(fields, 1, n)}
  end
  fields[n + 1], fields[n + 2], fields[n + 3], fields[n + 4] = 'reason', reason, 'attempts', attempts
  redis.call('XADD', DEAD, '*', unpack(fields))
  redis.call('XDEL', STREAM, id)
end

local function over_the_limit(id, count)
  bury(id, count, 'delivered ' .. count .. ' times without a settlement: the limit of its queue')
end

-- Pending again for nobody, to come again at `due`. True if it waits now.
local function put_back(id, count, limit, due)
  if count >= limit then
    over_the_limit(id, count)
    return false
  end
  redis.call('XCLAIM', STREAM, GROUP, NOBODY, 0, id, 'RETRYCOUNT', count, 'JUSTID')
  redis.call('ZADD', WAIT, due, pad(id))
  return true
end

-- All that a token holds goes back, and the token is forgotten.
local function release(token, limit)
  local waits, before = false, nil
  while true do
    local held = redis.call('XPENDING', STREAM, GROUP, '-', '+', 200, token)
    -- Each turn takes some away; with a token that no consumer has it would not.
    if #held == 0 or held[1][1] == before then break end
    before = held[1][1]
    for _, one in ipairs(held) do
      if put_back(one[1], one[4], limit, 0) then waits = true end
    end
  end
  redis.call('XGROUP', 'DELCONSUMER', STREAM, GROUP, token)
  redis.call('ZREM', HOLDERS, token)
  return waits
end

-- Takes from those whose lease has ended (C1).
local function sweep(at, me, limit)
  -- A few at a time: the rest comes with the next call.
  for _, token in ipairs(redis.call('ZRANGEBYSCORE', HOLDERS, '-inf', at, 'LIMIT', 0, 64)) do
    if token ~= me then release(token, limit) end
  end
end
