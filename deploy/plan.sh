#!/usr/bin/env bash
# The plan job of the compose files: labelled rows in, gear plan out, through the Triton that is to serve it.
#
#   FAMILY=digits MODELS="digits_cnn digits_resnet" ROWS=./rows GOAL=./goal.toml docker compose run --rm plan
#
# /rows holds search.npz and calibration.npz (`input:<TENSOR>`, `label`). Nothing else may use the Triton meanwhile. What
# was measured stays in /plans: an interrupted job goes on from there, and one on rows and models that it has seen plans
# at once. The plan is /plans/gear_plan.json; the one before is kept as gear_plan.previous.json.
set -euo pipefail
: "${FAMILY:?is not set: name the family}" "${MODELS:?is not set: name its models, from cheap to dear}"

repository=/state/model_repository
models=()
for model in $MODELS; do
  models+=(--model "$model")
done
common=(--cluster /config/cluster.toml --endpoint "${ENDPOINT:-triton0}" --repository "$repository" "${models[@]}")

# Measurements are kept by what they are of: these rows, these models as they stand in the repository.
of_models=$(for model in $MODELS; do find "$repository/$model" -type f ! -path '*/configs/*' -print0; done |
  sort --zero-terminated | xargs --null sha256sum | sha256sum | cut -c 1-12)
kept() { echo "/plans/$1-$(sha256sum "/rows/$2.npz" | cut -c 1-12)-$of_models.$3"; }

for split in search calibration; do
  records=$(kept "$split" "$split" npz)
  [ -e "$records" ] ||
    cascadeserve record "${common[@]}" --family "$FAMILY" --rows "/rows/$split.npz" --split "$split" --output "$records"
done
profile=$(kept profile search json)
[ -e "$profile" ] || cascadeserve profile "${common[@]}" --rows /rows/search.npz ${PROFILE_OPTIONS:-} --output "$profile"

new=/plans/gear_plan.new.json
rm -f "$new"
cascadeserve plan --goal /config/goal.toml --cluster /config/cluster.toml --repository "$repository" \
  --profile "$profile" --search "$(kept search search npz)" --calibration "$(kept calibration calibration npz)" \
  --name "${PLAN_NAME:-$FAMILY}" ${PLAN_OPTIONS:-} --output "$new"
[ ! -e /plans/gear_plan.json ] || mv /plans/gear_plan.json /plans/gear_plan.previous.json
mv "$new" /plans/gear_plan.json
