#!lua
-- Learns from one answer of upstream: counts values, tests the body's setting, opens and resolves doubts.
--   KEYS  1 account's learned state, 2 scope
--   ARGV  1 limits: JSON {scopes, settings, digests, values, share, bodies, reach, factor, learn_from, ttl_ms, lifetime_ms}:
--         see proxy/learning/limits.py
--         2 scope's id, 3 team, 4 a new random id, 5 price epoch when it was asked, 6 when it was asked, in ms
--         7 '1' for an audit, 8 digest of the body, 9 digest of the answer's data, 10 estimate, 11 the rest of its data
--         12 members: JSON {items, paths}, kept for people
--         13 leaves: JSON array of [text, class, counts as a value, never left out, number | '', length | '']
--   reply { effect, setting, old estimate, old rest, contradiction: JSON | '', the store's time in ms, evicted scopes }
-- Invariants: all of a scope's proof is in one key. An answer that was asked before a purge, before the list moved or
-- before its setting started over changes no price. What is lost is learned again: an account without an epoch gets a
-- new one, so no older price counts, and a new proof id, so no older test does.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local limits, leaves = cjson.decode(ARGV[1]), cjson.decode(ARGV[13])
local scope_id, team, fresh_id, body = ARGV[2], ARGV[3], ARGV[4], ARGV[8]

local found = redis.call('HMGET', KEYS[1], 'epoch', 'proof', 'doubts', 'scope:' .. scope_id)
local account = { epoch = found[1] or fresh_id, proof = found[2] or fresh_id, doubts = found[3] or '' }
if ARGV[5] ~= (found[1] or '') then
  return { 'ignored', '', '', '', '', now, {} }
end

local fields = { 'head', 'bodies', 'unchecked' }
for i = 1, #leaves do
  fields[#fields + 1] = 'leaf:' .. i
end
local stored = redis.call('HMGET', KEYS[2], unpack(fields))
local head = stored[1] and cjson.decode(stored[1]) or {
  left = string.rep('0', #leaves), ranges = {}, tests = 0, factor = 1, proof = account.proof, settings = 0, asked = 0,
  audits = 0, list_moves = 0, contradictions = 0, agreed_at = now, team = team,
}
local writes, contradiction = { 'members', ARGV[12] }, ''
local function write(field, value)
  writes[#writes + 1] = field
  writes[#writes + 1] = value
end

local function without_doubt(doubts, id)
  local kept = {}
  for name, deadline in string.gmatch(doubts, '(%S+):(%d+)') do
    if name ~= id then
      kept[#kept + 1] = name .. ':' .. deadline
    end
  end
  return table.concat(kept, ' ')
end

local function contradict()
  local latest = { since = head.agreed_at, ['until'] = now, suspects = tonumber(stored[3] or 0) }
  contradiction = cjson.encode(latest)
  -- The time span that people look for is that of suspect answers: a later contradiction without any keeps it.
  if latest.suspects > 0 or not head.last or head.last.suspects == 0 then
    head.last = latest
  end
  head.tests, head.factor, head.contradictions = 0, math.min(limits.factor, head.factor * 2), head.contradictions + 1
  if head.doubt.answering then
    account.proof = fresh_id
    account.doubts = without_doubt(account.doubts, scope_id)
  end
  head.proof, head.doubt, head.agreed_at = account.proof, nil, now
  write('unchecked', '0')
end

-- A doubt that nobody resolved in time counts as a contradiction: in this scope, and in the account if it is a doubt of
-- a scope that was answering. A doubt about prices that were dropped is over.
local function settle_expired_doubts()
  for name, deadline in string.gmatch(account.doubts, '(%S+):(%d+)') do
    if tonumber(deadline) <= now and (name ~= scope_id or not head.doubt) then
      account.proof = fresh_id
      account.doubts = without_doubt(account.doubts, name)
    end
  end
  if head.doubt and head.doubt.epoch ~= account.epoch then
    head.doubt = nil
  elseif head.doubt and head.doubt['until'] <= now then
    head.doubt.answering = string.find(account.doubts, scope_id .. ':', 1, true) and true
    contradict()
  end
  if head.proof ~= account.proof then
    head.tests, head.proof = 0, account.proof
  end
end

-- Counts a value in the text '<values> <distinct values> <their digests>'. Returns the counts, the new text, and whether
-- the value was known.
local function remember(text, value)
  local digest = string.sub(redis.sha1hex(value), 1, 6) .. ' '
  local count, distinct, digests = string.match(text or '0 0 ', '^(%d+) (%d+) (.*)$')
  count, distinct = count + 1, tonumber(distinct)
  local is_known = string.find(digests, digest, 1, true) ~= nil
  if not is_known then
    distinct, digests = distinct + 1, digests .. digest
    if #digests >= limits.digests * 7 then
      count, distinct, digests = math.floor(count / 2), math.floor(distinct / 2), ''
    end
  end
  return count, distinct, count .. ' ' .. distinct .. ' ' .. digests, is_known
end

-- Counts the leaves' values, unless the body was counted before. Returns which leaves are left out now, and whether one
-- counts again that was left out.
local function count_leaves(is_known)
  local left, is_kept_again = {}, false
  for i, leaf in ipairs(leaves) do
    local was_left, never = string.sub(head.left, i, i) == '1', leaf[4] == 1
    local is_left = was_left and not never
    if leaf[3] == 1 and not never and not is_known then
      local count, distinct, text = remember(stored[3 + i], leaf[1])
      write('leaf:' .. i, text)
      if was_left then
        is_left = distinct >= limits.share / 2 * count
      else
        is_left = distinct >= limits.values and distinct > limits.share * count
      end
    end
    is_kept_again = is_kept_again or was_left and not is_left
    left[i] = is_left and '1' or '0'
  end
  return table.concat(left), is_kept_again
end

-- Fields of the scope's settings with their times, the oldest first.
local function settings_by_age()
  local all, ages = redis.call('HGETALL', KEYS[2]), {}
  for i = 1, #all, 2 do
    if string.sub(all[i], 1, 2) == 's:' then
      ages[#ages + 1] = { tonumber(string.match(all[i + 1], '^%d+')), all[i] }
    end
  end
  table.sort(ages, function(a, b) return a[1] < b[1] end)
  return ages
end

-- Other members count now, so these are other settings: settings, ranges and tests begin again.
local function begin_again(left, is_kept_again, dropped)
  for i, old in ipairs(settings_by_age()) do
    dropped[i] = old[2]
  end
  if head.doubt then
    account.doubts = without_doubt(account.doubts, scope_id)
  end
  head.left, head.ranges, head.tests, head.settings, head.doubt = left, {}, 0, 0, nil
  if is_kept_again then
    head.factor = 1
  end
end

-- The id of the body's setting, and the measures of its left-out leaves.
local function setting_of(left)
  local parts, measures = { left }, {}
  for i, leaf in ipairs(leaves) do
    if string.sub(left, i, i) == '0' then
      parts[#parts + 1] = leaf[1]
    else
      parts[#parts + 1] = '~' .. leaf[2]
      if leaf[5] ~= '' then
        measures[i .. 'n'] = leaf[5]
      end
      if leaf[6] ~= '' then
        measures[i .. 's'] = leaf[6]
      end
    end
  end
  return string.sub(redis.sha1hex(table.concat(parts, '\n')), 1, 24), measures
end

local function largest(reach)
  return reach and math.max(math.abs(tonumber(reach[1])), math.abs(tonumber(reach[2]))) or 0
end

-- Whether a body with these measures is inside the range. `is_marked`: the setting is the one in doubt.
local function is_inside(measures, setting, is_marked)
  if #setting.bodies == 0 then
    return false
  end
  for name, value in pairs(measures) do
    local range, number, own = head.ranges[name], tonumber(value), largest(setting.reach[name])
    if is_marked then
      -- The bodies before the doubt do not agree with the new answer, but show which bodies are usual here.
      own = math.max(own, largest(setting.before[name]))
    end
    if not range or number < tonumber(range[1]) or number > tonumber(range[2])
      or math.abs(number) > limits.reach * own then
      return false
    end
  end
  return true
end

local function extend(ranges, added)
  for name, value in pairs(added) do
    local low, high = value, value
    if type(value) == 'table' then
      low, high = value[1], value[2]
    end
    local range = ranges[name] or { low, high }
    ranges[name] = {
      tonumber(low) < tonumber(range[1]) and low or range[1],
      tonumber(high) > tonumber(range[2]) and high or range[2],
    }
  end
end

-- The setting that has only this answer.
local function started_over(measures, since)
  local reach = {}
  extend(reach, measures)
  return {
    epoch = account.epoch, since = since, bodies = { body }, reach = reach,
    data = ARGV[9], estimated = ARGV[10], rest = ARGV[11],
  }
end

local function is_listed(bodies)
  for _, other in ipairs(bodies) do
    if other == body then
      return true
    end
  end
  return false
end

-- Adds another body that agrees with its setting.
local function add_body(setting, measures)
  extend(head.ranges, setting.reach)
  extend(head.ranges, measures)
  extend(setting.reach, measures)
  if #setting.bodies < limits.bodies then
    setting.bodies[#setting.bodies + 1] = body
  end
end

-- Resolves the doubt about this setting: the price list has moved.
local function move_list(setting)
  account.epoch, account.doubts = fresh_id, ''
  setting.epoch, setting.doubt, setting.before, setting.was, head.doubt = fresh_id, nil, nil, nil, nil
  head.list_moves, head.agreed_at = head.list_moves + 1, now
  write('unchecked', '0')
end

-- Opens a doubt, unless there is one, and marks the setting that starts over with the new answer.
local function open_doubt(setting, measures)
  if not head.doubt then
    local answering = head.tests >= limits.learn_from * head.factor
    head.doubt = { at = now, ['until'] = now + limits.ttl_ms, epoch = account.epoch, answering = answering }
    if answering then
      account.doubts = account.doubts .. ' ' .. scope_id .. ':' .. string.format('%.0f', head.doubt['until'])
    end
  end
  local marked = started_over(measures, now)
  marked.doubt, marked.before, marked.was = head.doubt.at, setting.reach, { setting.estimated, setting.rest }
  return marked
end

-- Adds the oldest quarter of the scope's settings to `dropped`, if a new one would be too many.
local function make_room_for_setting(dropped)
  head.settings = head.settings + 1
  if head.settings > limits.settings then
    local ages = settings_by_age()
    local quarter = math.ceil(#ages / 4)
    for i = 1, quarter do
      dropped[#dropped + 1] = ages[i][2]
    end
    head.settings = #ages - quarter + 1
  end
end

-- The scope that makes room for a new one in the account; nil if there is room.
local function scope_to_evict()
  local all, total, by_team, oldest, oldest_of_team = redis.call('HGETALL', KEYS[1]), 0, 0, nil, nil
  for i = 1, #all, 2 do
    local id = string.match(all[i], '^scope:(.*)$')
    if id then
      local used, brought_by = string.match(all[i + 1], '^(%d+) (.*)$')
      local entry = { id = id, used = tonumber(used) }
      total = total + 1
      oldest = (not oldest or entry.used < oldest.used) and entry or oldest
      if brought_by == team then
        by_team = by_team + 1
        oldest_of_team = (not oldest_of_team or entry.used < oldest_of_team.used) and entry or oldest_of_team
      end
    end
  end
  if by_team >= math.floor(limits.scopes / 2) then
    return oldest_of_team.id
  end
  return total >= limits.scopes and oldest.id or nil
end

-- What is done with an answer, in order.
settle_expired_doubts()
local _, _, body_counts, is_known = remember(stored[2], body)
write('bodies', body_counts)
local left, is_kept_again = count_leaves(is_known)
local dropped = {}
if left ~= head.left then
  begin_again(left, is_kept_again, dropped)
end

local setting_id, measures = setting_of(left)
local text = #dropped == 0 and redis.call('HMGET', KEYS[2], 's:' .. setting_id)[1]
local setting = text and cjson.decode(string.match(text, '^%d+ (.*)$'))
if not setting or setting.epoch ~= account.epoch then
  setting = { since = 0, bodies = {} }
end
local is_marked = setting.doubt and head.doubt and setting.doubt == head.doubt.at
local inside = is_inside(measures, setting, is_marked)

-- What the answer means. `at`: the setting's new time; nil leaves the setting as it is.
local effect, at = 'agreed', now
local old_estimated, old_rest = setting.estimated or '', setting.rest or ''
if tonumber(ARGV[6]) < setting.since then
  effect = 'ignored'
elseif #setting.bodies == 0 then
  effect = 'new'
  setting = started_over(measures, setting.since)
elseif setting.data == ARGV[9] then
  if not is_listed(setting.bodies) then
    if inside and not is_known and not head.doubt then
      head.tests, head.agreed_at = head.tests + 1, now
      write('unchecked', '0')
    end
    add_body(setting, measures)
    if is_marked and #setting.bodies == limits.bodies then
      effect = 'list-moved'
      if setting.was then
        old_estimated, old_rest = setting.was[1], setting.was[2]
      end
      move_list(setting)
    end
  end
  setting.estimated, setting.rest = ARGV[10], ARGV[11]
elseif not inside then
  effect = 'outside'
  if #setting.bodies < limits.bodies and not is_marked then
    setting = started_over(measures, setting.since)
  else
    at = nil
  end
elseif is_marked then
  effect = 'contradicted'
  contradict()
  setting = started_over(measures, now)
else
  effect = 'doubt'
  setting = open_doubt(setting, measures)
end
head.asked = head.asked + 1
if ARGV[7] == '1' then
  head.audits = head.audits + 1
end
if not text and effect == 'new' then
  make_room_for_setting(dropped)
end
local evicted = not found[4] and scope_to_evict()

for i = 1, #dropped, 100 do
  redis.call('HDEL', KEYS[2], unpack(dropped, i, math.min(i + 99, #dropped)))
end
if effect ~= 'ignored' and at then
  write('s:' .. setting_id, string.format('%.0f ', at) .. cjson.encode(setting))
end
write('head', cjson.encode(head))
redis.call('HSET', KEYS[2], unpack(writes))
redis.call('PEXPIRE', KEYS[2], limits.lifetime_ms)
if evicted then
  redis.call('HDEL', KEYS[1], 'scope:' .. evicted)
end
redis.call('HSET', KEYS[1], 'epoch', account.epoch, 'proof', account.proof, 'doubts', account.doubts,
  'scope:' .. scope_id, string.format('%.0f ', now) .. head.team)
redis.call('PEXPIRE', KEYS[1], limits.lifetime_ms)
return { effect, setting_id, old_estimated, old_rest, contradiction, now, { evicted or nil } }
