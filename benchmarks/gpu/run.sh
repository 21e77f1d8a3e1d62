#!/usr/bin/env bash
# Measures a cascade against its largest model on one GPU; see README.md beside this file.
#   benchmarks/gpu/run.sh                        on a machine with a GPU, at most 8 minutes
#   benchmarks/gpu/run.sh --device cpu --quick   tries the script on any machine
# PYTHON: interpreter to use. PYTHONPATH and TRITON_WHEEL_DIR: folders with packages that this interpreter lacks.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$repo/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=$(command -v python3) || { echo "Error: no python3 found; set PYTHON" >&2; exit 2; }
fi

carried=${TRITON_WHEEL_DIR:-}${PYTHONPATH:+:$PYTHONPATH}
if [[ -n ${carried#:} ]]; then
  if [[ -n ${TRITON_WHEEL_DIR:-} && ! -x $TRITON_WHEEL_DIR/pytriton/tritonserver/bin/tritonserver ]]; then
    echo "Error: TRITON_WHEEL_DIR holds no executable pytriton/tritonserver/bin/tritonserver" >&2
    exit 2
  fi
  # The interpreter inside Triton's Python stub ignores PYTHONPATH; it only knows the packages of the environment of the
  # first python3 on the path. So make an environment that has everything this interpreter sees, in the same order.
  overlay=$(mktemp -d "${TMPDIR:-/tmp}/cascadeserve-python-XXXXXX")
  "$PYTHON" -m venv --without-pip "$overlay"
  site=$("$overlay/bin/python3" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  PYTHONPATH=${carried#:} "$PYTHON" -c 'import sys, os
print(*(os.path.abspath(p) for p in sys.path if p and os.path.isdir(p)), sep="\n")' >"$site/carried.pth"
  PYTHON=$overlay/bin/python3
fi

export PYTHONPATH=$repo PYTHONUNBUFFERED=1
cd "$repo"
# In the background and waited for, so that signals reach it at once and the environment is removed afterwards.
"$PYTHON" -m benchmarks.gpu "$@" &
child=$!
trap 'kill -TERM "$child" 2>/dev/null || true' TERM INT
status=0
wait "$child" || status=$?
while kill -0 "$child" 2>/dev/null; do
  status=0
  wait "$child" || status=$?
done
[[ -z ${overlay:-} ]] || rm -rf "$overlay"
exit "$status"
