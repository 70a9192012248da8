-- Puts a question to whoever holds a lane now; nothing is stored. Answers how many heard it.
-- KEYS: lane. ARGV: publish-command question
local holder = redis.call('GET', KEYS[1])
if not holder then return 0 end
return redis.call(ARGV[1], KEYS[1] .. ':' .. holder, ARGV[2])
