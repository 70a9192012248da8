-- Leaves a guest's reports in its own tray, and says so.
-- KEYS: tray. ARGV: as for publish, whose sender, turn and again are not used: a report that is left twice
-- has one id.
local codes, i = {}, 5
while i <= #ARGV do
  local n = tonumber(ARGV[i + 1])
  redis.call('XADD', KEYS[1], '*', unpack(ARGV, i + 2, i + 1 + n))
  codes[#codes + 1] = 's'
  i = i + 2 + n
end
redis.call(ARGV[1], KEYS[1], '')
return {table.concat(codes)}
