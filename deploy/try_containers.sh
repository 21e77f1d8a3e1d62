#!/usr/bin/env bash
# Builds docker-compose.cpu.yml, sends it requests, kills its Triton, has it plan for itself and serve that plan, lets a
# Prometheus scrape it (if `prometheus` is installed here), and takes everything down again.
#
#   deploy/try_containers.sh
#   PLAN=./my_plan.json MODEL_REPOSITORY=./my_models deploy/try_containers.sh
#
# Prints PASS or FAIL per check, and writes how many there were of each to $RESULT; the exit status is 0 only if all
# passed. Needs a Docker engine with compose, and a
# Python with tritonclient ($PYTHON, by default the project's environment).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-.venv/bin/python}
READY_WITHIN_S=180
RESULT=${RESULT:-benchmarks/results/local/containers.json}
mkdir -p "$(dirname "$RESULT")"
rm -f "$RESULT"
export PLAN=${PLAN:-./examples/digits/gear_plan.json} MODEL_REPOSITORY=${MODEL_REPOSITORY:-./model_repository}

stop_here() {
  echo "Error: $*" >&2
  exit 2
}
"$PYTHON" -c 'import tritonclient.http, tritonclient.grpc' ||
  stop_here "$PYTHON has no tritonclient; \`make .venv/.installed\` makes one that has, or set PYTHON"
[ -f "$PLAN" ] || stop_here "there is no gear plan at $PLAN; set PLAN"
ls "$MODEL_REPOSITORY"/*/config.pbtxt >/dev/null ||
  stop_here "there is no model in $MODEL_REPOSITORY; set MODEL_REPOSITORY"
if docker compose version >/dev/null 2>&1; then
  compose=(docker compose)
elif command -v docker-compose >/dev/null; then
  compose=(docker-compose)
else
  stop_here "neither 'docker compose' nor docker-compose is installed"
fi
# Its own project and free ports: what may be running on this machine stays as it is.
read -r HTTP_PORT GRPC_PORT < <("$PYTHON" -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in sockets))')
export HTTP_PORT GRPC_PORT LISTEN=127.0.0.1
engine=("${compose[@]}")
compose+=(--project-name cascadeserve-try --file docker-compose.cpu.yml)

passed=0 failed=0
finish() {
  status=$?
  trap - EXIT
  if ((status || failed)); then
    "${compose[@]}" logs --no-color --tail=40 || true
  fi
  # A second time if need be: compose removes containers side by side, and podman keeps one whose namespace others
  # are still in.
  down=("${compose[@]}" down --volumes --timeout 30)
  check "everything taken down" eval '"${down[@]}" >/dev/null 2>&1 || "${down[@]}"' || true
  ((status == 0 || failed > 0)) || failed=1
  echo "{\"passed\": $passed, \"failed\": $failed}" >"$RESULT"
  ((status)) || status=$((failed > 0))
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM

# check WHAT COMMAND...: runs the command and says how it went.
check() {
  local what=$1 began=$SECONDS
  shift
  if "$@"; then
    echo "PASS: $what ($((SECONDS - began)) s)"
    passed=$((passed + 1))
  else
    echo "FAIL: $what ($((SECONDS - began)) s)"
    failed=$((failed + 1))
    return 1
  fi
}

# client KIND: sends a request of three rows, made up from the plan's input specs, and checks the answer's form.
client() {
  "$PYTHON" - "$1" "$PLAN" <<'PY'
import json
import os
import sys

import numpy as np
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

kind, plan = sys.argv[1:]
if kind == "http":
    import tritonclient.http as protocol
else:
    import tritonclient.grpc as protocol
ROWS = 3
with protocol.InferenceServerClient(f"127.0.0.1:{os.environ[f'{kind.upper()}_PORT']}") as server:
    for name, family in json.load(open(plan))["families"].items():
        inputs = []
        for spec in family["inputs"]:
            shape = [ROWS, *(max(size, 1) for size in spec["shape"])]
            inputs.append(protocol.InferInput(spec["name"], shape, spec["datatype"]))
            inputs[-1].set_data_from_numpy(np.zeros(shape, triton_to_np_dtype(spec["datatype"])))
        try:
            label = server.infer(name, inputs).as_numpy("label")
        except (InferenceServerException, OSError) as error:
            sys.exit(f"{kind}: {error}")
        if label is None or label.shape != (ROWS, 1):
            sys.exit(f"{kind}: {name} answered {label!r} to {ROWS} rows")
PY
}

# eventually COMMAND...: tries until the command succeeds.
eventually() {
  local give_up=$((SECONDS + READY_WITHIN_S))
  until "$@" 2>/dev/null; do
    ((SECONDS < give_up)) || return 1
    sleep 0.5
  done
}

ready() {
  "$PYTHON" -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:$HTTP_PORT/v2/health/ready', timeout=2)"
}

# From outside, the namespace's own address must answer on the orchestrator's port and refuse Triton's.
only_orchestrator_reachable() {
  local address
  address=$("${compose[@]}" exec -T network python3 -c \
    'import socket; print(socket.gethostbyname(socket.gethostname()))')
  "$PYTHON" - "$address" <<'PY'
import socket
import sys


def reachable(port):
    try:
        socket.create_connection((sys.argv[1], port), timeout=2).close()
    except OSError:
        return False
    return True


if not reachable(8080):
    # Docker Desktop: containers have no address on the host; the listening addresses are checked all the same
    print(f"note: the host does not reach {sys.argv[1]} at all", file=sys.stderr)
sys.exit(any(reachable(port) for port in (8000, 8001, 8002)))
PY
}

# Inside the namespace: Triton's three ports are bound to loopback.
triton_on_loopback() {
  "${compose[@]}" exec -T triton python3 -c '
import sys
bound = set()
for table in ("/proc/net/tcp", "/proc/net/tcp6"):
    for line in open(table).readlines()[1:]:
        _, local, _, state, *_ = line.split()
        address, port = local.split(":")
        if state == "0A" and int(port, 16) in (8000, 8001, 8002):  # listening
            bound.add((int(port, 16), address[-8:]))  # the last four bytes: 127.0.0.1 may be mapped into IPv6
sys.exit(bound != {(port, "0100007F") for port in (8000, 8001, 8002)})'
}

# triton_process [SIGNAL]: prints which process the server is (pid and start time), and may send it a signal.
triton_process() {
  "${compose[@]}" exec -T triton python3 -c '
import os, sys
from pathlib import Path
for process in Path("/proc").glob("[0-9]*"):
    if (process / "comm").read_text() == "tritonserver\n":
        print(process.name, (process / "stat").read_text().rpartition(")")[2].split()[19])
        if sys.argv[1:]:
            os.kill(int(process.name), int(sys.argv[1]))
        sys.exit()
sys.exit("no tritonserver")' "$@"
}

# Rows and a goal for the plan job: few rows, hence a wide certificate.
prepare_plan_job() {
  "$PYTHON" - "$ROWS" <<'PY'
import sys
from pathlib import Path

import numpy as np
from examples.digits.data import rows

folder = Path(sys.argv[1])
for split in ("search", "calibration"):
    made = rows(split, 1500)
    np.savez(folder / f"{split}.npz", **{"input:image": made.inputs, "label": made.labels})
(folder / "goal.toml").write_text("""
schema_version = 1
[families.digits]
slo_per_reference_batch = 20.0
below_reference = 0.01
max_epsilon = 0.1
""")
PY
  chmod -R a+rX "$ROWS"
}

# The orchestrator answers by a plan of this name.
answers_by() {
  "$PYTHON" - "$1" <<'PY'
import os
import sys

import numpy as np
import tritonclient.http as http

tensor = http.InferInput("image", [1, 1, 32, 32], "FP32")
tensor.set_data_from_numpy(np.zeros((1, 1, 32, 32), np.float32))
with http.InferenceServerClient(f"127.0.0.1:{os.environ['HTTP_PORT']}") as server:
    answer = server.infer("digits", [tensor]).get_response()
sys.exit(answer["parameters"]["plan"] != sys.argv[1])
PY
}

# A Prometheus on the host finds the orchestrator's metrics through the published port.
scraped() {
  local folder port
  folder=$(mktemp -d)
  port=$("$PYTHON" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
  sed -e "s/127.0.0.1:8080/127.0.0.1:$HTTP_PORT/" -e "s#/etc/prometheus/alerts.yml#$PWD/deploy/prometheus/alerts.yml#" \
    -e 's/scrape_interval: .*/scrape_interval: 1s/' deploy/prometheus/prometheus.cpu.yml >"$folder/prometheus.yml"
  prometheus --config.file="$folder/prometheus.yml" --storage.tsdb.path="$folder/data" \
    --web.listen-address="127.0.0.1:$port" >"$folder/log" 2>&1 &
  local pid=$! status=0
  eventually query_prometheus "$port" || status=1
  kill "$pid" && wait "$pid" || true
  ((status == 0)) || tail -5 "$folder/log"
  rm -rf "$folder"
  return "$status"
}

query_prometheus() {
  "$PYTHON" - "$1" <<'PY'
import json
import sys
from urllib.request import urlopen

query = "sum(cascadeserve_rows_answered_total)"
with urlopen(f"http://127.0.0.1:{sys.argv[1]}/api/v1/query?query={query}", timeout=2) as answer:
    result = json.load(answer)["data"]["result"]
sys.exit(not (result and float(result[0]["value"][1]) > 0))
PY
}

# Another tritonserver than the one given runs.
restarted() {
  local now
  now=$(triton_process) && [ "$now" != "$1" ]
}

# Two of these cannot run without GPUs; that every compose accepts them is better than nothing.
accepted() {
  local what=$1
  shift
  check "docker-compose.yml accepted by $what" quietly "$@" --file docker-compose.yml config || true
  check "docker-compose.2gpu.yml accepted by $what" \
    quietly "$@" --file docker-compose.yml --file docker-compose.2gpu.yml config || true
  check "docker-compose.cpu.yml accepted by $what" quietly "$@" --file docker-compose.cpu.yml config || true
}
quietly() { "$@" >/dev/null; }

accepted "${engine[*]}" "${engine[@]}"
if command -v podman-compose >/dev/null; then
  accepted podman-compose podman-compose
else
  echo "NOT RUN: compose files accepted by podman-compose (it is not installed)"
fi
check "build" "${compose[@]}" build --quiet || exit 1
check "start; orchestrator after a healthy Triton" "${compose[@]}" up --detach || exit 1
check "ready through the published port" eventually ready || exit 1
check "inference over HTTP" client http || true
check "inference over gRPC" client grpc || true
check "Triton not reachable from the host" only_orchestrator_reachable || true
check "Triton bound to loopback" triton_on_loopback || true
before=$(triton_process 9)
check "Triton restarted after SIGKILL" eventually restarted "$before" || exit 1
check "HTTP inference again" eventually client http || true
check "gRPC inference again" eventually client grpc || true
if [ "$PLAN" = ./examples/digits/gear_plan.json ]; then
  export FAMILY=digits MODELS="digits_cnn digits_resnet" PROFILE_OPTIONS=--quick PLAN_NAME=made-here ROWS GOAL
  ROWS=$(mktemp -d)
  GOAL=$ROWS/goal.toml
  check "rows for the plan job" prepare_plan_job || exit 1
  check "plan job" "${compose[@]}" run --rm plan || exit 1
  export PLAN_FILE=/plans/gear_plan.json
  check "orchestrator with that plan" "${compose[@]}" up --detach orchestrator || exit 1
  check "answers by that plan" eventually answers_by made-here || true
  rm -rf "$ROWS"
fi
if command -v prometheus >/dev/null; then
  check "scraped by Prometheus" scraped || true
else
  echo "NOT RUN: scraped by Prometheus (it is not installed; Debian has it)"
fi
check "stop" "${compose[@]}" stop --timeout 30 || true
