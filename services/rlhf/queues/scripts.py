"""The Lua scripts: each is one atomic step of a queue or of the registry, and each may be sent twice.

A lost reply leaves the caller not knowing whether a script ran, so it sends it again; every script here gives the same
effect when it runs twice. Counters move in the same script as what they count. The first write of each script but
ENQUEUE is a command that Redis admits when its memory is full, after which it admits the rest: a full Redis can
always be emptied. What the keys hold is written in `rlhf.queues.keys`.
"""

from __future__ import annotations

ADDED, DUPLICATE, FULL = 1, 2, 0
FENCED = -1

ENQUEUE = """
-- Adds one entry unless its id was seen or the queue is full. The nonce of the call tells a repeated call from a
-- second producer, so that a call whose first reply was lost answers ADDED too.
-- KEYS  1 stream  2 counts  3 sizes  4 seen:<id>
-- ARGV  1 id  2 payload  3 max entries  4 max bytes  5 ms to remember the id  6 nonce  7… further fields and values
-- Returns 1 added, 2 duplicate, 0 full.
local nonce = redis.call('GET', KEYS[4])
if nonce then return nonce == ARGV[6] and 1 or 2 end
local size = #ARGV[2]
local bytes = tonumber(redis.call('HGET', KEYS[2], 'bytes') or '0')
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[3]) or bytes + size > tonumber(ARGV[4]) then return 0 end
local entry = redis.call('XADD', KEYS[1], '*', 'id', ARGV[1], 'p', ARGV[2], unpack(ARGV, 7))
redis.call('HSET', KEYS[3], entry, size)
redis.call('HINCRBY', KEYS[2], 'bytes', size)
redis.call('HINCRBY', KEYS[2], 'added', 1)
redis.call('SET', KEYS[4], ARGV[6], 'PX', ARGV[5])
return 1
"""

SETTLE = """
-- Acknowledges and deletes entries, counting only those that were pending. One that somebody deleted from the stream
-- may have left the pending entries too (Redis 7 removes it there); its size says that it was never counted.
-- KEYS  1 stream  2 counts  3 sizes  4 attempts  5 fence
-- ARGV  1 group  2 fence held or ''  3 counter: acknowledged or lost  4… entry ids
-- Returns how many were counted, or -1 when another owner holds the fence.
if ARGV[2] ~= '' and redis.call('GET', KEYS[5]) ~= ARGV[2] then return -1 end
local function vanished(entry)
  return redis.call('HEXISTS', KEYS[3], entry) == 1 and #redis.call('XRANGE', KEYS[1], entry, entry) == 0
end
local settled, bytes = 0, 0
for i = 4, #ARGV do
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[i]) == 1 or vanished(ARGV[i]) then
    settled = settled + 1
    bytes = bytes + tonumber(redis.call('HGET', KEYS[3], ARGV[i]) or '0')
    redis.call('XDEL', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[3], ARGV[i])
    redis.call('HDEL', KEYS[4], ARGV[i])
  end
end
if settled > 0 then
  redis.call('HINCRBY', KEYS[2], ARGV[3], settled)
  redis.call('HINCRBY', KEYS[2], 'bytes', 0 - bytes)
end
return settled
"""

FAIL = """
-- Counts a failure of one entry; at the limit moves it to the dead letters, of which the oldest go when there are too
-- many. The nonce of the call keeps a repeated call from counting twice.
-- KEYS  1 stream  2 counts  3 sizes  4 attempts  5 fence  6 dead
-- ARGV  1 group  2 fence held or ''  3 consumer  4 entry id  5 reason  6 failures that are too many
--       7 nonce  8 max dead letters  9 max bytes of dead letters
-- Returns 'RETRY', 'DEAD', 'GONE' when the entry is not pending with this consumer, 'VANISHED' when somebody deleted it
-- from the stream, or 'FENCED'.
if ARGV[2] ~= '' and redis.call('GET', KEYS[5]) ~= ARGV[2] then return 'FENCED' end
local stream, group, consumer, entry = KEYS[1], ARGV[1], ARGV[3], ARGV[4]
local found = redis.call('XRANGE', stream, entry, entry)[1]
if not found then return redis.call('HEXISTS', KEYS[3], entry) == 1 and 'VANISHED' or 'GONE' end
local pending = redis.call('XPENDING', stream, group, entry, entry, 1)
if #pending == 0 or pending[1][2] ~= consumer then return 'GONE' end
redis.call('XCLAIM', stream, group, consumer, 0, entry, 'JUSTID')

local before = redis.call('HGET', KEYS[4], entry) or '0:'
local failures, nonce = string.match(before, '^(%d+):(.*)$')
failures = tonumber(failures)
if nonce ~= ARGV[7] then
  failures = failures + 1
  redis.call('HSET', KEYS[4], entry, failures .. ':' .. ARGV[7])
end
if failures < tonumber(ARGV[6]) then return 'RETRY' end

local size = tonumber(redis.call('HGET', KEYS[3], entry) or '0')
redis.call('XACK', stream, group, entry)
redis.call('XDEL', stream, entry)
redis.call('HDEL', KEYS[3], entry)
redis.call('HDEL', KEYS[4], entry)
redis.call('HINCRBY', KEYS[2], 'bytes', 0 - size)
local letter = found[2]
for _, value in ipairs({'reason', ARGV[5], 'attempts', failures, 'entry', entry, 'size', size}) do
  table.insert(letter, value)
end
redis.call('XADD', KEYS[6], '*', unpack(letter))
redis.call('HINCRBY', KEYS[2], 'dead', 1)
local bytes = redis.call('HINCRBY', KEYS[2], 'dead_bytes', size)
local letters = redis.call('XLEN', KEYS[6])
while letters > tonumber(ARGV[8]) or (bytes > tonumber(ARGV[9]) and letters > 1) do
  local oldest = redis.call('XRANGE', KEYS[6], '-', '+', 'COUNT', 1)[1]
  redis.call('XDEL', KEYS[6], oldest[1])
  bytes = redis.call('HINCRBY', KEYS[2], 'dead_bytes', 0 - tonumber(oldest[2][#oldest[2]]))
  letters = letters - 1
end
return 'DEAD'
"""

RENEW = """
-- Sets the idle time of entries back to 0, of those that are still pending with this consumer.
-- KEYS  1 stream  2 fence
-- ARGV  1 group  2 fence held or ''  3 consumer  4… entry ids
-- Returns the ids that were renewed, or -1 when another owner holds the fence.
if ARGV[2] ~= '' and redis.call('GET', KEYS[2]) ~= ARGV[2] then return -1 end
local kept = {}
for i = 4, #ARGV do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)
  if #pending == 1 and pending[1][2] == ARGV[3] then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, ARGV[i], 'JUSTID')
    table.insert(kept, ARGV[i])
  end
end
return kept
"""

DEPTH = """
-- Everything countable about a queue, at one instant.
-- KEYS  1 stream  2 counts  3 dead
-- ARGV  1 group
-- Returns entries, pending, age of the oldest entry in ms, dead letters kept,
-- then bytes, added, acknowledged, dead, lost as strings or nil.
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
local held = pending.err and 0 or pending[1]
local age, oldest = 0, redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1]
if oldest then
  local now = redis.call('TIME')
  age = math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(string.match(oldest[1], '^%d+')))
end
local counts = redis.call('HMGET', KEYS[2], 'bytes', 'added', 'acknowledged', 'dead', 'lost')
return {redis.call('XLEN', KEYS[1]), held, age, redis.call('XLEN', KEYS[3]), unpack(counts)}
"""

ADVANCE = """
-- Moves the weights pointer forward, if it is where the caller thinks and the new version is later.
-- KEYS  1 current  2 changed
-- ARGV  1 run_id  2 epoch  3 step  4 sha256  5 uri  6 expected "<run_id>/<epoch>/<step>/<sha256>", '' for no pointer
-- Returns 1 when the pointer now is the new version (also when it already was), else 0.
local now = redis.call('HMGET', KEYS[1], 'run_id', 'epoch', 'step', 'sha256', 'uri')
local name = now[1] and table.concat({now[1], now[2], now[3], now[4]}, '/') or ''
if name == table.concat({ARGV[1], ARGV[2], ARGV[3], ARGV[4]}, '/') then return now[5] == ARGV[5] and 1 or 0 end
if name ~= ARGV[6] then return 0 end
if now[1] then
  local epoch, step = tonumber(now[2]), tonumber(now[3])
  local later = tonumber(ARGV[2]) > epoch or (tonumber(ARGV[2]) == epoch and tonumber(ARGV[3]) > step)
  if now[1] ~= ARGV[1] or not later then return 0 end
end
redis.call('HSET', KEYS[1], 'run_id', ARGV[1], 'epoch', ARGV[2], 'step', ARGV[3], 'sha256', ARGV[4], 'uri', ARGV[5])
redis.call('PUBLISH', KEYS[2], '')
return 1
"""

LEASE = """
-- Writes one leased value and its name.
-- KEYS  1 set of names  2 key of the value
-- ARGV  1 name  2 value  3 lease in ms
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
return 1
"""

LEASED = """
-- All values whose lease holds; names without one are forgotten.
-- KEYS  1 set of names
-- ARGV  1 prefix of the keys of the values (in the same slot)
-- Returns the values.
local values = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local value = redis.call('GET', ARGV[1] .. name)
  if value then table.insert(values, value) else redis.call('SREM', KEYS[1], name) end
end
return values
"""
