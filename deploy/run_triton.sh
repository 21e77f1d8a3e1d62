#!/usr/bin/env bash
# Starts the tritonserver of endpoint $ENDPOINT in NVIDIA's container, for docker-compose.yml: the models of /models,
# from the working copy in /state, under the endpoint's own configs. The same flags as
# cascadeserve/local_triton/server.py where they apply.
set -euo pipefail

shopt -s nullglob
load=()
for config in /models/*/config.pbtxt; do
  load+=("--load-model=$(basename "$(dirname "$config")")")
done
if ((${#load[@]} == 0)); then
  echo "Error: /models holds no model (a folder with a config.pbtxt); set MODEL_REPOSITORY to what \`export\` wrote" >&2
  exit 1
fi

# Nobody is told this key, so what it guards is closed to everyone. The orchestrator needs health and inference over
# HTTP, and health, configs and the repository over gRPC; `record` and `profile` infer over gRPC, and `profile` reads the
# statistics there.
key=$(head -c 32 /dev/urandom | sha256sum | cut -d ' ' -f 1)

exec tritonserver \
  --model-repository=/state/model_repository \
  --model-control-mode=explicit \
  --strict-readiness=false \
  "${load[@]}" \
  "--model-config-name=${ENDPOINT:?is not set: name the endpoint as the cluster file does}" \
  --disable-auto-complete-config \
  --exit-timeout-secs=10 \
  --http-max-input-size=1073741824 \
  "--http-restricted-api=model-config,model-repository,shared-memory,statistics,trace,logging:admin-key=$key" \
  "--grpc-restricted-protocol=shared-memory,trace,logging:admin-key=$key"
