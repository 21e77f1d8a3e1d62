#!/usr/bin/env bash
# The plan job of the compose files: labelled rows in, gear plan out, through the Triton that is to serve it.
#
#   FAMILY=digits MODELS="digits_cnn digits_resnet" ROWS=./rows GOAL=./goal.toml docker compose run --rm plan
#
# /rows holds search.npz and calibration.npz (`input:<TENSOR>`, `label`). Nothing else may use the Triton meanwhile. What
# was measured stays in /plans: an interrupted job goes on from there, and one on rows and models that it has seen plans
# at once. MODELS takes NAME or NAME:VERSION. The plan is /plans/gear_plan.json; the one before is kept as gear_plan.previous.json.
set -euo pipefail
: "${FAMILY:?is not set: name the family}" "${MODELS:?is not set: name its models, from cheap to dear}"

repository=/state/model_repository
models=()
for model in $MODELS; do
  models+=(--model "$model")
done
common=(--cluster /config/cluster.toml --endpoint "${ENDPOINT:-triton0}" --repository "$repository" "${models[@]}")

# Measurements are kept by all that they depend on. `choose_models` gives the digest of a version of a model, and that of
# an ensemble covers the models that it is made of.
digest() { sha256sum | cut -c 1-12; }
of_models=$(
  python3 - "$repository" $MODELS <<'PY'
import sys
from pathlib import Path

from cascadeserve.errors import CascadeServeError
from planner.recording import choose_models

try:
    chosen = choose_models(Path(sys.argv[1]), sys.argv[2:])
except CascadeServeError as error:
    sys.exit(f"Error: {error}")
for name, model in chosen.items():
    print(name, model.version, model.digest)
PY
)
records() { echo "/plans/$1-$({ echo "$FAMILY $of_models" && cat "/rows/$1.npz"; } | digest).npz"; }
search=$(records search) calibration=$(records calibration)
profile=/plans/profile-$({
  echo "${ENDPOINT:-} ${PROFILE_OPTIONS:-} $of_models"
  cat /config/cluster.toml /rows/search.npz
} | digest).json

for split in search calibration; do
  [ -e "${!split}" ] ||
    cascadeserve record "${common[@]}" --family "$FAMILY" --rows "/rows/$split.npz" --split "$split" \
      --output "${!split}"
done
[ -e "$profile" ] || cascadeserve profile "${common[@]}" --rows /rows/search.npz ${PROFILE_OPTIONS:-} --output "$profile"

# A server in service takes no second plan of the same name, so the name says what the plan was made from.
made_from=$({
  echo "${PLAN_OPTIONS:-}"
  cat /config/goal.toml /config/cluster.toml "$search" "$calibration" "$profile"
} | digest)
new=/plans/gear_plan.new.json
rm -f "$new"
cascadeserve plan --goal /config/goal.toml --cluster /config/cluster.toml --repository "$repository" \
  --profile "$profile" --search "$search" --calibration "$calibration" \
  --name "${PLAN_NAME:-$FAMILY-$made_from}" ${PLAN_OPTIONS:-} --output "$new"
[ ! -e /plans/gear_plan.json ] || mv /plans/gear_plan.json /plans/gear_plan.previous.json
mv "$new" /plans/gear_plan.json
