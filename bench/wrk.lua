-- Plays a traffic file of the bench (`traffic.py` has its form) and ends with one line of JSON.
-- Arguments behind the URL: the file, the number of the first counted request.

local pieces, turns = {}, {}
local at, turn_count, distinct = 0, 0, 0

local function read_pieces(file, count)
  for i = 1, count do
    local length = file:read("*n")
    file:read(1)
    pieces[i] = file:read(length)
  end
end

local function next_listed()
  at = at % turn_count + 1
  return pieces[turns[at]]
end

local function next_counted()
  at = at + 1
  return pieces[1] .. string.format("%012d", at) .. pieces[2]
end

local function next_drawn()
  return pieces[1] .. string.format("%012d", 100000000000 + math.random(distinct)) .. pieces[2]
end

function init(args)
  local file = assert(io.open(args[1], "rb"))
  local kind, first, second = file:read("*l"):match("^(%a+) (%d+) ?(%d*)$")
  if kind == "listed" then
    read_pieces(file, tonumber(first))
    turn_count = tonumber(second)
    for i = 1, turn_count do turns[i] = file:read("*n") end
    request = next_listed
  else
    read_pieces(file, 2)
    distinct = tonumber(first)
    at = tonumber(args[2])
    math.randomseed(at)
    request = distinct == 0 and next_counted or next_drawn
  end
  file:close()
end

function request() end -- wrk looks for one before init() has chosen it

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\n{"requests":%d,"seconds":%.6f,"p50_ms":%.3f,"p99_ms":%.3f,"refused":%d,"broken":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
