-- A gateway as somebody at home in nginx would write it: look the team up, write the body in one spelling, and let one
-- script in Redis take from the rate, look for the price and count. No quotas, problem documents, coalescing or stale
-- prices: it does less than ours, which is what makes it worth passing.

local cjson = require "cjson"
local redis = require "nginx.redis"

local peer = {}

local TEAMS = { ["@TOKEN@"] = "design" }
local ANSWER = '{"data":{"estimated":5,"balance":20},"error":{}}'

-- KEYS: the price, the team's rate (a theoretical arrival time in microseconds), the team's usage.
local SCRIPT = [[
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local arrival = tonumber(redis.call('GET', KEYS[2]) or 0)
if arrival < now then arrival = now end
redis.call('SET', KEYS[2], string.format('%.0f', arrival + 10), 'PX', 60000)
local price = redis.call('GET', KEYS[1])
if price then
  redis.call('HINCRBY', KEYS[3], 'hit', 1)
  redis.call('HINCRBY', KEYS[3], 'micro', 5000000)
end
return { price, redis.call('HGET', KEYS[3], 'micro') }
]]

local function write(value, out)
  if type(value) ~= "table" then
    out[#out + 1] = cjson.encode(value)
  elseif #value > 0 then
    out[#out + 1] = "["
    for i = 1, #value do
      if i > 1 then out[#out + 1] = "," end
      write(value[i], out)
    end
    out[#out + 1] = "]"
  else
    local names = {}
    for name in pairs(value) do names[#names + 1] = name end
    table.sort(names)
    out[#out + 1] = "{"
    for i = 1, #names do
      if i > 1 then out[#out + 1] = "," end
      out[#out + 1] = cjson.encode(names[i])
      out[#out + 1] = ":"
      write(value[names[i]], out)
    end
    out[#out + 1] = "}"
  end
end

local function canonical(body)
  local out = {}
  write(cjson.decode(body), out)
  return table.concat(out)
end

function peer.answer()
  local team = TEAMS[ngx.req.get_headers()["x-api-key"]]
  if not team then
    ngx.status = 401
    return ngx.say("{}")
  end
  ngx.req.read_body()
  local key = "c:" .. ngx.md5(canonical(ngx.req.get_body_data()))
  local store = redis:new()
  store:set_timeout(1000)
  local ok, reason = store:connect("127.0.0.1", @STORE_PORT@)
  if not ok then
    ngx.status = 503
    return ngx.say(reason)
  end
  local found = store:eval(SCRIPT, 3, key, "r:" .. team, "u:" .. team)
  local price, how = found and found[1], "p; hit"
  if not price or price == ngx.null then
    price, how = ANSWER, "p; fwd=miss"
    store:set(key, price)
  end
  store:set_keepalive(10000, 100)
  ngx.header["content-type"] = "application/json"
  ngx.header["cache-status"] = how
  ngx.print(price)
end

return peer
