-- For wrk: POSTs the bodies of a file of equally long ones, one after the other, and writes its counts as JSON.
-- Arguments: path, file of bodies, bytes of each, bytes of JSON in each.
function init(args)
  local size = tonumber(args[3])
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/octet-stream"
  wrk.headers["Inference-Header-Content-Length"] = args[4]
  local file = assert(io.open(args[2], "rb"))
  requests, place = {}, 0
  while true do
    local body = file:read(size)
    if body == nil then break end
    requests[#requests + 1] = wrk.format(nil, args[1], nil, body)
  end
  file:close()
end

function request()
  place = place % #requests + 1
  return requests[place]
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(string.format(
    '{"answers": %d, "errors": %d, "seconds": %f, "p50_s": %f, "p99_s": %f}\n',
    summary.requests - errors.status,
    errors.connect + errors.read + errors.write + errors.timeout + errors.status,
    summary.duration / 1e6, latency:percentile(50) / 1e6, latency:percentile(99) / 1e6
  ))
end
