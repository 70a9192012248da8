-- What is pending under a token: after a connection broke only the server knows what it had claimed.
-- ARGV: token epoch from
if redis.call('HGET', META, 'epoch') ~= ARGV[2] then return {'gone'} end
if not redis.call('ZSCORE', HOLDERS, ARGV[1]) then return {'lost'} end
local held = {}
for _, one in ipairs(redis.call('XPENDING', STREAM, GROUP, ARGV[3], '+', 1000, ARGV[1])) do
  held[#held + 1] = {one[1], one[4]}
end
return {'ok', held}
