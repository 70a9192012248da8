-- Which trays have something in them, of the guests that report to one queue; some at a time.
-- KEYS: credentials. ARGV: cursor reports
local scan = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', 500)
local found, all = {}, scan[2]
for i = 1, #all, 2 do
  if all[i + 1] == ARGV[2] and redis.call('EXISTS', 'wilco:{' .. all[i] .. '}:tray') == 1 then
    found[#found + 1] = all[i]
  end
end
return {scan[1], found}
