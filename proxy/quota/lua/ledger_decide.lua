#!lua
-- Decides requests in order, and books what it admits: all of a request or nothing.
-- A *counter set* is what a team's requests, or the organisation's, are booked on while none of its windows ends.
-- `proxy/quota/ledger_script.py` writes the arguments and reads the reply.
--   KEYS  1 ledger's id, 2 models, 3 teams, 4 marker that makes a second run a no-op (or KEYS[1]: no marker),
--         5 use of models
--         of each counter set: the team's usage and rate, or the organisation's time at upstream; and its counters
--   ARGV  1 start and 2 end in µs of the time in which the counter sets are valid, 3 id for a new ledger,
--         4 limit on models, 5 lifetime in ms of KEYS[4], 6 number of counter sets, 7 number of entries
--         of each counter set: number of the organisation's counter set (0: this is it), expiry of the usage or of the
--           time at upstream in ms, team, interval between two requests and burst tolerance in µs, number of counters,
--           expiry of each in ms, number of quotas, of each: number of its counter, its field, its limit, 1 if it
--           refuses
--         of each entry: operation, counter set, number of requests, micro-credits ('' unknown), model, outcome,
--           counter set on which the request was admitted, time at upstream in µs ('' none)
--   reply { now in µs } if the counter sets are not valid now: nothing was written
--         { now in µs, '' } if the marker exists: nothing was written
--         { now in µs, id, creation time in ms, 1 if it is new, verdict of each entry, state of each counter set }
--         error 'FULL' if a counter would come near the end of the store's integers: nothing was written
--         A verdict is { 'ok' | 'rate' | numbers of the exceeded quotas, with commas; number of admitted requests;
--         model; state at the decision, if a request is refused or a quota only warns }. A state is { TAT in µs; use of
--         each quota, the team's and then the organisation's }, after all entries; the organisation's state is {}.
-- Operations:
--   charge           stored answers of one price: rate, requests and credits
--   admit            requests to upstream: rate and requests; refused if no credits are left
--   settle           the result of an admitted request, in the windows of now: books request and credits, or refuses it
--                    and undoes the request's booking; with the outcome 'over-ceiling', only the request is booked; in
--                    any case books its time at upstream
--   refund           an admitted request that was not sent upstream: undoes its booking, and books a refusal; by a
--                    quota if the credits of the refused answer would exceed it
--   peek             uses one request of the rate and checks the quotas
--   record_uncached  uses one request of the rate, for an estimate that the client did not want from upstream
--   over_ceiling     a stored answer over its request's ceiling: uses one request of the rate, and books a refusal;
--                    refused if the answer would exceed a quota
--   use_rate         requests for stored prices in a quote: uses one of the rate for each
--   release          an admitted request that was not sent upstream, for a quote: undoes its booking
--   apply            books requests that were admitted without the ledger, and the sums of their credits and of their
--                    time at upstream, unchecked
-- `charge`, `admit` and `use_rate` take several equal requests: the first ones are admitted, as many as rate and quotas
-- allow, and the rest is refused with the entry's verdict.
-- Invariants:
--   Usage and counters always agree: an admitted request is in the usage as 'cancelled' until it is settled.
--   All decisions come before the first write, so an error leaves nothing half written.
--   The sums that a call adds are below 2^53, where Lua's numbers are exact: `ledger_script.py` limits the amounts. The
--   limits of quotas are, too. A counter may be above: then it is read inexactly, but as above its limit, and HINCRBY
--   still adds to it exactly.

-- Models:
--   KEYS[2] has the models that count under a name of their own. KEYS[5] has for each `<day of its last use>:<team that
--   brought it>`, in days since 1970, and for `:<team>` `<day on which the team found no place>:`.
--   A new model gets a place while there are fewer than ARGV[4], and while its team holds less than half of them. A
--   model that was not used for 30 days loses its place when a new one looks for a place.

-- The limit for the organisation's month. Its week can be twice as high, and the store's integers end at 9.2e18.
local MAX_COUNTER = 4e18
local call = redis.call

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now < tonumber(ARGV[1]) or now >= tonumber(ARGV[2]) then
  return { now }
end
local has_marker = KEYS[4] ~= KEYS[1]
if has_marker and call('EXISTS', KEYS[4]) == 1 then
  return { now, '' }
end

-- What this call adds to counters and usage, by key.
local counters, usages = {}, {}

local function counter_at(key, expires)
  local counter = counters[key]
  if not counter then
    counter = { key = key, expires = expires, requests = 0, credits = 0 }
    counters[key] = counter
  end
  return counter
end

local function usage_at(key, expires)
  local usage = usages[key]
  if not usage then
    usage = { key = key, expires = expires, sums = {} }
    usages[key] = usage
  end
  return usage
end

local function count_in(set, requests, credits)
  for i = 1, #set.counters do
    local counter = set.counters[i]
    counter.requests = counter.requests + requests
    counter.credits = counter.credits + credits
  end
end

local function count(set, requests, credits)
  count_in(set, requests, credits)
  count_in(set.org, requests, credits)
end

-- Adds to a field of the usage. `split_usage_field` in `proxy/quota/counters.py` reads its name.
local function add_usage(set, model, outcome, measure, amount)
  local field = model .. ':' .. outcome .. ':' .. measure
  set.usage.sums[field] = (set.usage.sums[field] or 0) + amount
end

-- The value of a counter with what this call adds. The stored value is read once.
local function used(counter, field)
  if not counter.stored then
    local stored = call('HMGET', counter.key, 'requests', 'credits')
    counter.stored = { requests = tonumber(stored[1] or 0), credits = tonumber(stored[2] or 0) }
  end
  return counter.stored[field] + counter[field]
end

local key_at, arg_at = 5, 7

local function read_set(sets)
  local set = { org = sets[tonumber(ARGV[arg_at + 1])], counters = {}, quotas = {}, team = ARGV[arg_at + 3] }
  if set.org then
    set.usage, set.rate = usage_at(KEYS[key_at + 1], ARGV[arg_at + 2]), KEYS[key_at + 2]
    set.interval, set.burst_tolerance = tonumber(ARGV[arg_at + 4]), tonumber(ARGV[arg_at + 5])
    key_at = key_at + 2
  else
    set.upstream = usage_at(KEYS[key_at + 1], ARGV[arg_at + 2])
    key_at = key_at + 1
  end
  local counter_count = tonumber(ARGV[arg_at + 6])
  arg_at = arg_at + 6
  for i = 1, counter_count do
    set.counters[i] = counter_at(KEYS[key_at + i], ARGV[arg_at + i])
  end
  key_at, arg_at = key_at + counter_count, arg_at + counter_count + 1
  for i = 1, tonumber(ARGV[arg_at]) do
    local counter, field = set.counters[tonumber(ARGV[arg_at + 1])], ARGV[arg_at + 2]
    local limit, refuses = tonumber(ARGV[arg_at + 3]), ARGV[arg_at + 4] == '1'
    set.warns = set.warns or not refuses
    set.quotas[i] = { counter = counter, field = field, limit = limit, refuses = refuses }
    arg_at = arg_at + 4
  end
  if set.org then
    set.warns = set.warns or set.org.warns
    for i = 1, #set.org.quotas do
      set.quotas[#set.quotas + 1] = set.org.quotas[i]
    end
  end
  return set
end

local sets = {}
for i = 1, tonumber(ARGV[6]) do
  sets[i] = read_set(sets)
end

-- Theoretical arrival times (TAT) in µs by rate: all that were read, and those that this call changes.
local tats, new_tats = {}, {}

local function tat_of(set)
  if not tats[set.rate] then
    tats[set.rate] = tonumber(call('GET', set.rate) or 0)
  end
  return tats[set.rate]
end

-- How far the TAT is ahead of now. Bounded, so that a clock that was set back makes no team wait long.
local function tat_offset(set)
  return math.min(math.max(tat_of(set) - now, 0), set.burst_tolerance)
end

local function advance_tat(set, requests)
  local tat = now + tat_offset(set) + requests * set.interval
  tats[set.rate], new_tats[set.rate] = tat, tat
end

-- The numbers of the quotas that this would exceed, or 'ok'. `starts`: also refuse if nothing is left, even for a
-- request that costs nothing.
local function violated(set, requests, credits, starts)
  local found
  for i = 1, #set.quotas do
    local quota = set.quotas[i]
    if quota.refuses then
      local total = used(quota.counter, quota.field)
      local wanted = quota.field == 'requests' and requests or credits
      if total + wanted > quota.limit or (starts and total >= quota.limit) then
        found = found and found .. ',' .. i or tostring(i)
      end
    end
  end
  return found or 'ok'
end

-- The integer quotient, corrected where the division was rounded up.
local function quotient(amount, divisor)
  local found = math.floor(amount / divisor)
  return found * divisor > amount and found - 1 or found
end

-- How many of several requests the rate allows at once.
local function within_rate(set, requests)
  return math.min(requests, quotient(set.burst_tolerance - tat_offset(set), set.interval))
end

-- How many of several equal requests can be admitted: as many as if each was decided alone, one after the other.
local function admissible(set, requests, credits)
  local admitted = within_rate(set, requests)
  for i = 1, #set.quotas do
    local quota = set.quotas[i]
    if quota.refuses and admitted > 0 then
      local left = quota.limit - used(quota.counter, quota.field)
      local each = quota.field == 'requests' and 1 or credits
      if left <= 0 then
        admitted = 0
      elseif each > 0 then
        admitted = math.min(admitted, quotient(left, each))
      end
    end
  end
  return admitted
end

local MODEL_KEPT_DAYS = 30
local model_limit, today = tonumber(ARGV[4]), math.floor(now / 86400000000)
-- Models that have a place, those that lose theirs, and fields of KEYS[5] to write, each by name.
local models, forgotten, uses = {}, {}, {}
-- The number of places that are taken, in all and by team; nil until a new model looks for a place.
local places, places_of

local used_today = string.format('%.0f:', today)

local function split_use(use)
  local day, team = string.match(use, '^(%-?%d+):(.*)$')
  return tonumber(day), team
end

local function is_today(use)
  return string.sub(use, 1, #used_today) == used_today
end

-- Counts the places, and frees those of models that were not used for a while.
local function count_places()
  local stored, found = {}, call('HGETALL', KEYS[5])
  for i = 1, #found, 2 do
    stored[found[i]] = found[i + 1]
    if string.sub(found[i], 1, 1) == ':' and not is_today(found[i + 1]) then
      forgotten[found[i]] = true
    end
  end
  places, places_of = 0, {}
  for _, model in ipairs(call('SMEMBERS', KEYS[2])) do
    if not (uses[model] or stored[model]) then -- an older version of the gateway has added it
      uses[model] = used_today
    end
    local day, team = split_use(uses[model] or stored[model])
    if today - day > MODEL_KEPT_DAYS then
      forgotten[model] = true
    else
      places, places_of[team] = places + 1, (places_of[team] or 0) + 1
    end
  end
end

-- Whether a new model of the team gets a place. A team that found none is not counted again on the same day, because no
-- place becomes free before the next one.
local function takes_place(model, team)
  local found_none = uses[':' .. team] or call('HMGET', KEYS[5], ':' .. team)[1]
  if found_none and is_today(found_none) then
    return false
  end
  if not places then
    count_places()
    if uses[model] then -- it had a place in an older version
      return true
    end
  end
  local own = places_of[team] or 0
  if places >= model_limit or own >= math.floor(model_limit / 2) then
    uses[':' .. team] = used_today
    return false
  end
  places, places_of[team] = places + 1, own + 1
  uses[model] = used_today .. team
  return true
end

-- Whether the model has a place of its own. Notes that it was used today.
local function has_place(model, team)
  local use = not forgotten[model] and (uses[model] or call('HMGET', KEYS[5], model)[1])
  if not use then
    return takes_place(model, team)
  end
  if not is_today(use) then
    local _, brought_by = split_use(use)
    uses[model] = used_today .. brought_by
  end
  return true
end

-- The name that a model counts under: its own if it has a place, else 'other'.
local function named(model, team)
  if model == '-' or model == 'mixed' or model == 'other' then
    return model
  end
  models[model] = models[model] or has_place(model, team)
  return models[model] and model or 'other'
end

local function book(set, entry, requests, credits)
  entry.named = credits and named(entry.model, set.team) or '-'
  count(set, requests, credits or 0)
  add_usage(set, entry.named, entry.outcome, 'requests', requests)
  add_usage(set, entry.named, entry.outcome, 'credits', credits or 0)
end

local function book_pending(set, requests)
  count(set, requests, 0)
  add_usage(set, '-', 'cancelled', 'requests', requests)
end

local function record_refused(set, outcome, requests)
  add_usage(set, '-', outcome, 'refused', requests)
end

local function book_upstream(set, entry)
  if entry.upstream then
    local sums = set.org.upstream.sums
    sums.calls, sums.us = (sums.calls or 0) + entry.requests, (sums.us or 0) + entry.upstream
  end
end

local function is_rate_limited(set)
  return tat_offset(set) + set.interval > set.burst_tolerance
end

-- The verdict of equal requests, of which `admitted` are booked. The rest shares one verdict, because refusals change
-- neither rate nor counters.
local function verdict_of(set, entry, admitted, credits)
  if admitted == entry.requests then
    return 'ok', admitted
  end
  local verdict = is_rate_limited(set) and 'rate' or violated(set, 1, credits, true)
  record_refused(set, verdict == 'rate' and 'rate-limited' or 'quota-exceeded', entry.requests - admitted)
  return verdict, admitted
end

local operations = {}

function operations.charge(set, entry)
  local credits = entry.credits or 0
  local admitted = admissible(set, entry.requests, credits)
  if admitted > 0 then
    advance_tat(set, admitted)
    book(set, entry, admitted, entry.credits and admitted * credits)
  end
  return verdict_of(set, entry, admitted, credits)
end

function operations.admit(set, entry)
  local admitted = admissible(set, entry.requests, 0)
  if admitted > 0 then
    advance_tat(set, admitted)
    book_pending(set, admitted)
  end
  return verdict_of(set, entry, admitted, 0)
end

function operations.settle(set, entry)
  book_pending(entry.admitted_on, -1)
  book_upstream(set, entry)
  local verdict = entry.credits and violated(set, 1, entry.credits, false) or 'ok'
  if verdict ~= 'ok' then
    record_refused(set, 'quota-exceeded', 1)
    return verdict, 0
  end
  book(set, entry, 1, entry.outcome ~= 'over-ceiling' and entry.credits or nil)
  return verdict, 1
end

function operations.refund(set, entry)
  book_pending(entry.admitted_on, -1)
  local verdict = entry.credits and violated(set, 1, entry.credits, false) or 'ok'
  record_refused(set, verdict == 'ok' and entry.outcome or 'quota-exceeded', 1)
  return verdict, verdict == 'ok' and 1 or 0
end

function operations.peek(set, entry)
  if is_rate_limited(set) then
    return 'rate', 0
  end
  advance_tat(set, 1)
  local verdict = violated(set, 1, entry.credits or 0, true)
  return verdict, verdict == 'ok' and 1 or 0
end

function operations.record_uncached(set, entry)
  if is_rate_limited(set) then
    record_refused(set, 'rate-limited', 1)
    return 'rate', 0
  end
  advance_tat(set, 1)
  record_refused(set, entry.outcome, 1)
  return 'ok', 1
end

function operations.over_ceiling(set, entry)
  local admitted = not is_rate_limited(set) and violated(set, 1, entry.credits, true) == 'ok' and 1 or 0
  if admitted == 1 then
    advance_tat(set, 1)
    record_refused(set, entry.outcome, 1)
  end
  return verdict_of(set, entry, admitted, entry.credits)
end

function operations.use_rate(set, entry)
  local admitted = within_rate(set, entry.requests)
  if admitted > 0 then
    advance_tat(set, admitted)
  end
  if admitted < entry.requests then
    record_refused(set, 'rate-limited', entry.requests - admitted)
    return 'rate', admitted
  end
  return 'ok', admitted
end

function operations.release(_, entry)
  book_pending(entry.admitted_on, -1)
  return 'ok', 1
end

function operations.apply(set, entry)
  book_upstream(set, entry)
  book(set, entry, entry.requests, entry.credits)
  return 'ok', entry.requests
end

local function state_of(set)
  local state = { tat_of(set) }
  for i = 1, #set.quotas do
    state[1 + i] = used(set.quotas[i].counter, set.quotas[i].field)
  end
  return state
end

local verdicts, states = {}, {}
for i = 1, tonumber(ARGV[7]) do
  local set = sets[tonumber(ARGV[arg_at + 2])]
  local entry = { requests = tonumber(ARGV[arg_at + 3]), credits = tonumber(ARGV[arg_at + 4]) }
  entry.model, entry.outcome = ARGV[arg_at + 5], ARGV[arg_at + 6]
  entry.admitted_on, entry.upstream = sets[tonumber(ARGV[arg_at + 7])], tonumber(ARGV[arg_at + 8])
  local verdict, admitted = operations[ARGV[arg_at + 1]](set, entry)
  local state = (set.warns or verdict ~= 'ok') and state_of(set)
  verdicts[i] = { verdict, admitted, entry.named or '-', state or nil }
  arg_at = arg_at + 8
end
for i = 1, #sets do
  states[i] = sets[i].org and state_of(sets[i]) or {}
  if not sets[i].org then
    -- The month is last and has the largest sums, except for a week in two months; MAX_COUNTER leaves room for that.
    local month = sets[i].counters[#sets[i].counters]
    if used(month, 'requests') > MAX_COUNTER or used(month, 'credits') > MAX_COUNTER then
      return redis.error_reply('FULL a counter of the ledger is about to overflow')
    end
  end
end

local id = call('HMGET', KEYS[1], 'id', 'created_ms')
local is_new = not id[1]
if is_new then
  id = { ARGV[3], string.format('%.0f', math.floor(now / 1000)) }
  call('HSET', KEYS[1], 'id', id[1], 'created_ms', id[2])
end
if has_marker then
  call('SET', KEYS[4], '1', 'PX', ARGV[5])
end
for key, tat in pairs(new_tats) do
  call('SET', key, string.format('%.0f', tat), 'PX', math.ceil((tat - now) / 1000))
end
for name in pairs(forgotten) do
  call('SREM', KEYS[2], name)
  call('HDEL', KEYS[5], name)
end
for name, use in pairs(uses) do
  call('HSET', KEYS[5], name, use)
  if models[name] then
    call('SADD', KEYS[2], name)
  end
end

-- Notes in `starts` whether a field starts with this amount: only then its hash, or its team, can be new.
local function increase(hash, field, amount)
  if amount ~= 0 and call('HINCRBY', hash.key, field, string.format('%.0f', amount)) == amount then
    hash.starts = true
  end
end

local function expire(hash)
  if hash.starts and call('PTTL', hash.key) == -1 then
    call('PEXPIREAT', hash.key, hash.expires)
  end
end

for _, counter in pairs(counters) do
  increase(counter, 'requests', counter.requests)
  increase(counter, 'credits', counter.credits)
  expire(counter)
end
for _, usage in pairs(usages) do
  for field, sum in pairs(usage.sums) do
    increase(usage, field, sum)
  end
  expire(usage)
end
for i = 1, #sets do
  if sets[i].org and sets[i].usage.starts then
    call('SADD', KEYS[3], sets[i].team)
  end
end
return { now, id[1], id[2], is_new and 1 or 0, verdicts, states }
