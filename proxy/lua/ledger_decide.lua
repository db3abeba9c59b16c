#!lua
-- Decides about requests in order, each with its own verdict, and books what it admits: all of a request or none of it.
-- A *sheet* is what is booked for a team, or for the organisation, while none of its windows ends.
--   KEYS  1 ledger's id, 2 models, 3 teams, 4 what makes a second run a no-op (or 1 again: nothing does)
--         then of each sheet: the team's usage and rate (not of the organisation's), and one counter a window
--   ARGV  1 from and 2 until which time in µs the sheets hold, 3 an id for a new ledger, 4 most models,
--         5 lifetime in ms of KEYS[4], 6 number of sheets, 7 number of requests
--         of each sheet: number of the organisation's sheet (0: this is it), end of its usage in ms, team,
--           µs between two requests and how far ahead they may run, number of counters, of each its end in ms,
--           number of quotas, of each: its counter, its field, its limit, 1 if it refuses
--         of each request: operation, sheet, number of requests, micro-credits ('' unknown), model, outcome,
--           the sheet on which it was admitted
--   reply { now in µs } if the sheets do not hold now, or { now in µs, '' } after a second run; nothing is written
--         { now in µs, id, created at in ms, 1 if the ledger is new, a verdict a request }
--         A verdict is '<ok | rate | violated quotas by number, with commas> <µs the rate runs ahead>
--         <used of each quota, the team's and then the organisation's> <model>'.
-- Operations:
--   charge  a stored answer: rate, requests and credits
--   admit   a question on its way upstream: rate and requests; no credits may be left over the limit
--   settle  what became of it, in the windows of now: request and credits, or a refusal that gives the request back
--   refund  it never reached upstream: gives the request back
--   peek    rate alone; says how quotas stand
--   pass    rate alone, for an estimate that the client did not want from upstream
--   apply   what was admitted without the ledger: no checks
-- An admitted request stands in the usage as 'cancelled' until it is settled, so usage and counters always agree.
-- Sums are kept below 2^53, where numbers of Lua are exact; a quota's limit is lower than that.
local PENDING = '-:cancelled:requests'
local EXACT, FULL = 9e15, 8e18

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now < tonumber(ARGV[1]) or now >= tonumber(ARGV[2]) then
  return { string.format('%.0f', now) }
end
local once = KEYS[4] ~= KEYS[1]
if once and redis.call('EXISTS', KEYS[4]) == 1 then
  return { string.format('%.0f', now), '' }
end

local key_at, arg_at = 4, 7
local function next_key()
  key_at = key_at + 1
  return KEYS[key_at]
end
local function next_arg()
  arg_at = arg_at + 1
  return ARGV[arg_at]
end
local function next_number()
  return tonumber(next_arg())
end

local bases, sums, ends = {}, {}, {}

-- What a counter held before this call, by field.
local function base(key)
  local found = bases[key]
  if not found then
    local fields = redis.call('HMGET', key, 'requests', 'credits')
    found = { requests = tonumber(fields[1] or 0), credits = tonumber(fields[2] or 0) }
    bases[key] = found
  end
  return found
end

local function add(key, field, amount)
  local fields = sums[key]
  if not fields then
    fields = {}
    sums[key] = fields
  end
  local parts = fields[field]
  if not parts then
    parts = { 0 }
    fields[field] = parts
  end
  if math.abs(parts[#parts] + amount) > EXACT then
    parts[#parts + 1] = 0
  end
  parts[#parts] = parts[#parts] + amount
end

local function used(key, field)
  local total = base(key)[field]
  local parts = sums[key] and sums[key][field]
  if parts then
    for i = 1, #parts do
      total = total + parts[i]
    end
  end
  return total
end

local function read_sheet(sheets)
  local sheet = { org = sheets[next_number()], counters = {}, quotas = {} }
  local usage_end = next_number()
  sheet.team, sheet.interval, sheet.ahead = next_arg(), next_number(), next_number()
  if sheet.org then
    sheet.usage, sheet.rate = next_key(), next_key()
    ends[sheet.usage] = usage_end
  end
  for i = 1, next_number() do
    sheet.counters[i] = next_key()
    ends[sheet.counters[i]] = next_number()
  end
  for i = 1, next_number() do
    local quota = { counter = sheet.counters[next_number()], field = next_arg() }
    quota.limit, quota.refuses = next_number(), next_arg() == '1'
    sheet.quotas[i] = quota
  end
  return sheet
end

local sheets = {}
local sheet_count, request_count = tonumber(ARGV[6]), tonumber(ARGV[7])
for i = 1, sheet_count do
  sheets[i] = read_sheet(sheets)
end

local leads, new_leads = {}, {}

-- How far ahead of now a team's theoretical arrival time lies. A clock that went back holds nobody up.
local function lead(sheet)
  local found = leads[sheet.rate]
  if not found then
    found = tonumber(redis.call('GET', sheet.rate) or 0) - now
    leads[sheet.rate] = found
  end
  return math.min(math.max(found, 0), sheet.ahead)
end

local function each_quota(sheet, visit)
  for i = 1, #sheet.quotas do
    visit(i, sheet.quotas[i])
  end
  for i = 1, #sheet.org.quotas do
    visit(#sheet.quotas + i, sheet.org.quotas[i])
  end
end

-- The numbers of the quotas that this would pass. To begin something, of credits some must be left.
local function violated(sheet, requests, credits, begins)
  local found = {}
  each_quota(sheet, function(number, quota)
    if quota.refuses then
      local wanted = quota.field == 'requests' and requests or credits
      local total = used(quota.counter, quota.field)
      if total + wanted > quota.limit or (begins and total >= quota.limit) then
        found[#found + 1] = number
      end
    end
  end)
  return #found > 0 and table.concat(found, ',') or 'ok'
end

local function count(sheet, requests, credits)
  for _, owner in ipairs({ sheet, sheet.org }) do
    for i = 1, #owner.counters do
      add(owner.counters[i], 'requests', requests)
      add(owner.counters[i], 'credits', credits)
    end
  end
end

local models, model_count, new_models = {}, nil, {}

-- A model's own name if it is one of the first ones, else 'other'.
local function named(model)
  if model == '-' or model == 'mixed' or model == 'other' then
    return model
  end
  if models[model] == nil then
    models[model] = redis.call('SISMEMBER', KEYS[2], model) == 1
    if not models[model] then
      model_count = model_count or redis.call('SCARD', KEYS[2])
      if model_count < tonumber(ARGV[4]) then
        model_count, models[model] = model_count + 1, true
        new_models[#new_models + 1] = model
      end
    end
  end
  return models[model] and model or 'other'
end

local function book(sheet, request, requests, credits)
  request.named = credits and named(request.model) or '-'
  local row = request.named .. ':' .. request.outcome
  count(sheet, requests, credits or 0)
  add(sheet.usage, row .. ':requests', requests)
  add(sheet.usage, row .. ':credits', credits or 0)
end

local function refuse(sheet, outcome)
  add(sheet.usage, '-:' .. outcome .. ':refused', 1)
end

local function take_back(sheet)
  add(sheet.usage, PENDING, -1)
  count(sheet, -1, 0)
end

local operations = {}

-- What `charge`, `admit` and `peek` have in common: the rate first, then quotas.
local function begin(sheet, requests, credits)
  local ahead = lead(sheet) + sheet.interval
  if ahead > sheet.ahead then
    return 'rate'
  end
  local verdict = violated(sheet, requests, credits, true)
  if verdict == 'ok' then
    leads[sheet.rate], new_leads[sheet.rate] = ahead, ahead
  end
  return verdict
end

local function denied(sheet, verdict)
  refuse(sheet, verdict == 'rate' and 'rate-limited' or 'quota-exceeded')
  return verdict
end

function operations.charge(sheet, request)
  local verdict = begin(sheet, 1, request.credits or 0)
  if verdict ~= 'ok' then
    return denied(sheet, verdict)
  end
  book(sheet, request, 1, request.credits)
  return verdict
end

function operations.admit(sheet)
  local verdict = begin(sheet, 1, 0)
  if verdict ~= 'ok' then
    return denied(sheet, verdict)
  end
  count(sheet, 1, 0)
  add(sheet.usage, PENDING, 1)
  return verdict
end

function operations.settle(sheet, request)
  take_back(request.admitted)
  local verdict = request.credits and violated(sheet, 1, request.credits, false) or 'ok'
  if verdict ~= 'ok' then
    return denied(sheet, verdict)
  end
  book(sheet, request, 1, request.credits)
  return verdict
end

function operations.refund(sheet, request)
  take_back(request.admitted)
  refuse(sheet, request.outcome)
  return 'ok'
end

function operations.peek(sheet, request)
  local ahead = lead(sheet) + sheet.interval
  if ahead > sheet.ahead then
    return 'rate'
  end
  leads[sheet.rate], new_leads[sheet.rate] = ahead, ahead
  return violated(sheet, 1, request.credits or 0, true)
end

function operations.pass(sheet, request)
  local verdict = operations.peek(sheet, {})
  refuse(sheet, verdict == 'rate' and 'rate-limited' or request.outcome)
  return verdict == 'rate' and verdict or 'ok'
end

function operations.apply(sheet, request)
  book(sheet, request, request.requests, request.credits)
  return 'ok'
end

local reply = { string.format('%.0f', now), '', '', 0 }
for i = 1, request_count do
  local operation, sheet = next_arg(), sheets[next_number()]
  local request = { requests = next_number(), credits = tonumber(next_arg()), model = next_arg(), outcome = next_arg() }
  request.admitted = sheets[next_number()]
  local verdict = operations[operation](sheet, request)
  local words = { verdict, string.format('%.0f', lead(sheet)) }
  each_quota(sheet, function(_, quota)
    words[#words + 1] = string.format('%.0f', used(quota.counter, quota.field))
  end)
  words[#words + 1] = request.named or '-'
  reply[4 + i] = table.concat(words, ' ')
end
for i = 1, sheet_count do
  if not sheets[i].org then -- no counter is larger than the organisation's: if those are not full, none is
    for _, counter in ipairs(sheets[i].counters) do
      if used(counter, 'requests') > FULL or used(counter, 'credits') > FULL then
        return redis.error_reply('FULL a counter of the ledger is about to overflow')
      end
    end
  end
end

local id = redis.call('HMGET', KEYS[1], 'id', 'created_ms')
if not id[1] then
  id = { ARGV[3], string.format('%.0f', math.floor(now / 1000)) }
  redis.call('HSET', KEYS[1], 'id', id[1], 'created_ms', id[2])
  reply[4] = 1
end
reply[2], reply[3] = id[1], id[2]
if once then
  redis.call('SET', KEYS[4], '1', 'PX', ARGV[5])
end
for key, ahead in pairs(new_leads) do
  redis.call('SET', key, string.format('%.0f', now + ahead), 'PX', math.ceil(ahead / 1000))
end
for _, model in ipairs(new_models) do
  redis.call('SADD', KEYS[2], model)
end
for key, fields in pairs(sums) do
  for field, parts in pairs(fields) do
    for i = 1, #parts do
      if parts[i] ~= 0 then
        redis.call('HINCRBY', key, field, string.format('%.0f', parts[i]))
      end
    end
  end
end
for key in pairs(sums) do
  if redis.call('PTTL', key) == -1 then
    redis.call('PEXPIREAT', key, string.format('%.0f', ends[key]))
  end
end
for i = 1, sheet_count do
  if sheets[i].org and sums[sheets[i].usage] then
    redis.call('SADD', KEYS[3], sheets[i].team)
  end
end
return reply
