#!lua
-- Decides about requests in order, each with its own verdict, and books what it admits: all of a request or none of it.
-- A *sheet* is what is booked for a team, or for the organisation, while none of its windows ends.
--   KEYS  1 ledger's id, 2 models, 3 teams, 4 what makes a second run a no-op (or 1 again: nothing does)
--         then of each sheet: the team's usage and rate (not of the organisation's), and one counter a window
--   ARGV  1 from and 2 until which time in µs the sheets hold, 3 an id for a new ledger, 4 most models,
--         5 lifetime in ms of KEYS[4], 6 number of sheets, 7 number of entries
--         of each sheet: number of the organisation's sheet (0: this is it), end of its usage in ms, team,
--           µs between two requests and how far ahead they may run, number of counters, of each its end in ms,
--           number of quotas, of each: its counter, its field, its limit, 1 if it refuses
--         of each entry: operation, sheet, number of requests, micro-credits ('' unknown), model, outcome,
--           the sheet on which it was admitted
--   reply { now in µs } if the sheets do not hold now, or { now in µs, '' } after a second run; nothing is written
--         { now in µs, id, created at in ms, 1 if the ledger is new, verdicts of the entries, standings of the sheets }
--         A verdict is { ok | rate | violated quotas by number, with commas; requests that were admitted; model; how
--         the team stood then, if somebody is refused or a quota only warns }. A standing is { µs the rate runs ahead;
--         used of each quota, the team's and then the organisation's }, behind all entries; of the organisation's
--         sheet it is {}.
-- Operations:
--   charge  stored answers of one price: rate, requests and credits
--   admit   questions on their way upstream: rate and requests; no credits may be left over the limit
--   settle  what became of one, in the windows of now: request and credits, or a refusal that gives the request back
--   refund  one never reached upstream: gives the request back
--   peek    rate alone; says how quotas stand
--   pass    rate alone, for an estimate that the client did not want from upstream
--   apply   what was admitted without the ledger, credits in all: no checks
-- `charge` and `admit` take several requests alike: the first ones are admitted, as many as there is room for, and all
-- others refused by the verdict's word.
-- An admitted request stands in the usage as 'cancelled' until it is settled, so usage and counters always agree.
-- An entry has at most 45e12 micro-credits and a call 200 entries (`proxy/quota/counters.py`), so what a call adds is
-- below 2^53 and exact; a quota's limit is lower than that, too. A counter may be higher: only 'HINCRBY' adds to it.
local PENDING = '-:cancelled:requests'
local FULL = 4e18
local call = redis.call

local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
if now < tonumber(ARGV[1]) or now >= tonumber(ARGV[2]) then
  return { now }
end
local once = KEYS[4] ~= KEYS[1]
if once and call('EXISTS', KEYS[4]) == 1 then
  return { now, '' }
end

-- What this call adds to counters and usage, by key.
local counters, usages = {}, {}

local function counter_at(key, ends)
  local counter = counters[key]
  if not counter then
    counter = { key = key, ends = ends, requests = 0, credits = 0 }
    counters[key] = counter
  end
  return counter
end

local function usage_at(key, ends)
  local usage = usages[key]
  if not usage then
    usage = { key = key, ends = ends, sums = {} }
    usages[key] = usage
  end
  return usage
end

local function count_in(owner, requests, credits)
  for i = 1, #owner.counters do
    local counter = owner.counters[i]
    counter.requests = counter.requests + requests
    counter.credits = counter.credits + credits
  end
end

local function count(sheet, requests, credits)
  count_in(sheet, requests, credits)
  count_in(sheet.org, requests, credits)
end

local function add(usage, field, amount)
  usage.sums[field] = (usage.sums[field] or 0) + amount
end

-- What a counter holds with what this call adds. What it held before is read once.
local function used(counter, field)
  if not counter.held then
    local held = call('HMGET', counter.key, 'requests', 'credits')
    counter.held = { requests = tonumber(held[1] or 0), credits = tonumber(held[2] or 0) }
  end
  return counter.held[field] + counter[field]
end

local key_at, arg_at = 4, 7

local function read_sheet(sheets)
  local sheet = { org = sheets[tonumber(ARGV[arg_at + 1])], counters = {}, quotas = {}, team = ARGV[arg_at + 3] }
  if sheet.org then
    sheet.usage, sheet.rate = usage_at(KEYS[key_at + 1], ARGV[arg_at + 2]), KEYS[key_at + 2]
    sheet.interval, sheet.ahead = tonumber(ARGV[arg_at + 4]), tonumber(ARGV[arg_at + 5])
    key_at = key_at + 2
  end
  local counter_count = tonumber(ARGV[arg_at + 6])
  arg_at = arg_at + 6
  for i = 1, counter_count do
    sheet.counters[i] = counter_at(KEYS[key_at + i], ARGV[arg_at + i])
  end
  key_at, arg_at = key_at + counter_count, arg_at + counter_count + 1
  for i = 1, tonumber(ARGV[arg_at]) do
    local counter, field = sheet.counters[tonumber(ARGV[arg_at + 1])], ARGV[arg_at + 2]
    local limit, refuses = tonumber(ARGV[arg_at + 3]), ARGV[arg_at + 4] == '1'
    sheet.warns = sheet.warns or not refuses
    sheet.quotas[i] = { counter = counter, field = field, limit = limit, refuses = refuses }
    arg_at = arg_at + 4
  end
  if sheet.org then
    sheet.warns = sheet.warns or sheet.org.warns
    for i = 1, #sheet.org.quotas do
      sheet.quotas[#sheet.quotas + 1] = sheet.org.quotas[i]
    end
  end
  return sheet
end

local sheets = {}
for i = 1, tonumber(ARGV[6]) do
  sheets[i] = read_sheet(sheets)
end

local leads, new_leads = {}, {}

-- How far ahead of now a team's theoretical arrival time lies. A clock that went back holds nobody up.
local function lead(sheet)
  local found = leads[sheet.rate]
  if not found then
    found = tonumber(call('GET', sheet.rate) or 0) - now
    leads[sheet.rate] = found
  end
  return math.min(math.max(found, 0), sheet.ahead)
end

local function run_ahead(sheet, requests)
  local ahead = lead(sheet) + requests * sheet.interval
  leads[sheet.rate], new_leads[sheet.rate] = ahead, ahead
end

-- The numbers of the quotas that this would pass. To begin something, of credits some must be left.
local function violated(sheet, requests, credits, begins)
  local found
  for i = 1, #sheet.quotas do
    local quota = sheet.quotas[i]
    if quota.refuses then
      local total = used(quota.counter, quota.field)
      local wanted = quota.field == 'requests' and requests or credits
      if total + wanted > quota.limit or (begins and total >= quota.limit) then
        found = found and found .. ',' .. i or tostring(i)
      end
    end
  end
  return found or 'ok'
end

-- How often `each` goes into `room`, and no rounding makes it more.
local function times(room, each)
  local found = math.floor(room / each)
  return found * each > room and found - 1 or found
end

-- How many of so many requests alike may begin: for each of them in turn, nothing would be violated.
local function room_for(sheet, requests, credits)
  local room = math.min(requests, times(sheet.ahead - lead(sheet), sheet.interval))
  for i = 1, #sheet.quotas do
    local quota = sheet.quotas[i]
    if quota.refuses and room > 0 then
      local left = quota.limit - used(quota.counter, quota.field)
      local each = quota.field == 'requests' and 1 or credits
      if left <= 0 then
        room = 0
      elseif each > 0 then
        room = math.min(room, times(left, each))
      end
    end
  end
  return room
end

local models, model_count, new_models = {}, nil, {}

-- A model's own name if it is one of the first ones, else 'other'.
local function named(model)
  if model == '-' or model == 'mixed' or model == 'other' then
    return model
  end
  if models[model] == nil then
    models[model] = call('SISMEMBER', KEYS[2], model) == 1
    if not models[model] then
      model_count = model_count or call('SCARD', KEYS[2])
      if model_count < tonumber(ARGV[4]) then
        model_count, models[model] = model_count + 1, true
        new_models[#new_models + 1] = model
      end
    end
  end
  return models[model] and model or 'other'
end

local function book(sheet, entry, requests, credits)
  entry.named = credits and named(entry.model) or '-'
  local row = entry.named .. ':' .. entry.outcome
  count(sheet, requests, credits or 0)
  add(sheet.usage, row .. ':requests', requests)
  add(sheet.usage, row .. ':credits', credits or 0)
end

local function refuse(sheet, outcome, requests)
  add(sheet.usage, '-:' .. outcome .. ':refused', requests)
end

local function take_back(sheet)
  add(sheet.usage, PENDING, -1)
  count(sheet, -1, 0)
end

local function by_rate(sheet)
  return lead(sheet) + sheet.interval > sheet.ahead
end

-- What is left of requests alike is refused, each by the same verdict: nothing has changed between them.
local function verdict_of(sheet, entry, admitted, credits)
  if admitted == entry.requests then
    return 'ok', admitted
  end
  local verdict = by_rate(sheet) and 'rate' or violated(sheet, 1, credits, true)
  refuse(sheet, verdict == 'rate' and 'rate-limited' or 'quota-exceeded', entry.requests - admitted)
  return verdict, admitted
end

local operations = {}

function operations.charge(sheet, entry)
  local credits = entry.credits or 0
  local admitted = room_for(sheet, entry.requests, credits)
  if admitted > 0 then
    run_ahead(sheet, admitted)
    book(sheet, entry, admitted, entry.credits and admitted * credits)
  end
  return verdict_of(sheet, entry, admitted, credits)
end

function operations.admit(sheet, entry)
  local admitted = room_for(sheet, entry.requests, 0)
  if admitted > 0 then
    run_ahead(sheet, admitted)
    count(sheet, admitted, 0)
    add(sheet.usage, PENDING, admitted)
  end
  return verdict_of(sheet, entry, admitted, 0)
end

function operations.settle(sheet, entry)
  take_back(entry.admitted_on)
  local verdict = entry.credits and violated(sheet, 1, entry.credits, false) or 'ok'
  if verdict ~= 'ok' then
    refuse(sheet, 'quota-exceeded', 1)
    return verdict, 0
  end
  book(sheet, entry, 1, entry.credits)
  return verdict, 1
end

function operations.refund(sheet, entry)
  take_back(entry.admitted_on)
  refuse(sheet, entry.outcome, 1)
  return 'ok', 1
end

function operations.peek(sheet, entry)
  if by_rate(sheet) then
    return 'rate', 0
  end
  run_ahead(sheet, 1)
  local verdict = violated(sheet, 1, entry.credits or 0, true)
  return verdict, verdict == 'ok' and 1 or 0
end

function operations.pass(sheet, entry)
  if by_rate(sheet) then
    refuse(sheet, 'rate-limited', 1)
    return 'rate', 0
  end
  run_ahead(sheet, 1)
  refuse(sheet, entry.outcome, 1)
  return 'ok', 1
end

function operations.apply(sheet, entry)
  book(sheet, entry, entry.requests, entry.credits)
  return 'ok', entry.requests
end

local function standing(sheet)
  local told = { lead(sheet) }
  for i = 1, #sheet.quotas do
    told[1 + i] = used(sheet.quotas[i].counter, sheet.quotas[i].field)
  end
  return told
end

local verdicts, standings = {}, {}
for i = 1, tonumber(ARGV[7]) do
  local sheet = sheets[tonumber(ARGV[arg_at + 2])]
  local entry = { requests = tonumber(ARGV[arg_at + 3]), credits = tonumber(ARGV[arg_at + 4]) }
  entry.model, entry.outcome = ARGV[arg_at + 5], ARGV[arg_at + 6]
  entry.admitted_on = sheets[tonumber(ARGV[arg_at + 7])]
  local verdict, admitted = operations[ARGV[arg_at + 1]](sheet, entry)
  local stood = (sheet.warns or verdict ~= 'ok') and standing(sheet)
  verdicts[i] = { verdict, admitted, entry.named or '-', stood or nil }
  arg_at = arg_at + 7
end
for i = 1, #sheets do
  standings[i] = sheets[i].org and standing(sheets[i]) or {}
  if not sheets[i].org then -- no counter is larger than the organisation's; a week is in two months, which come last
    local month = sheets[i].counters[#sheets[i].counters]
    if used(month, 'requests') > FULL or used(month, 'credits') > FULL then
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
if once then
  call('SET', KEYS[4], '1', 'PX', ARGV[5])
end
for key, ahead in pairs(new_leads) do
  call('SET', key, string.format('%.0f', now + ahead), 'PX', math.ceil(ahead / 1000))
end
for _, model in ipairs(new_models) do
  call('SADD', KEYS[2], model)
end

-- Notes whether a field begins with this: only then can its hash, or its team, be new.
local function increase(hash, field, amount)
  if amount ~= 0 and call('HINCRBY', hash.key, field, string.format('%.0f', amount)) == amount then
    hash.begins = true
  end
end

local function expire(hash)
  if hash.begins and call('PTTL', hash.key) == -1 then
    call('PEXPIREAT', hash.key, hash.ends)
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
for i = 1, #sheets do
  if sheets[i].org and sheets[i].usage.begins then
    call('SADD', KEYS[3], sheets[i].team)
  end
end
return { now, id[1], id[2], is_new and 1 or 0, verdicts, standings }
