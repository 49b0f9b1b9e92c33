-- For serving_wrk.py: every request has the next of the given bodies, and the results are one line of numbers.
local requests, turn = {}, 0

function init(_)
  local file = assert(io.open(os.getenv("SERVING_BODIES"), "rb"))
  local size = tonumber(os.getenv("SERVING_BODY_BYTES"))
  local body = file:read(size)
  while body do
    requests[#requests + 1] = wrk.format("POST", nil, nil, body)
    body = file:read(size)
  end
  file:close()
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency, _)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.duration, summary.requests, errors.status, broken,
    latency:percentile(50), latency:percentile(99)))
end
