-- Reads dead letters, oldest first. KEYS: meta dead. ARGV: from count
if redis.call('EXISTS', KEYS[1]) == 0 then return {'none'} end
return {'ok', redis.call('XRANGE', KEYS[2], ARGV[1], '+', 'COUNT', ARGV[2])}
