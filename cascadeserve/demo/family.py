"""Which family the demo is about, and where things are in a checkout."""

from __future__ import annotations

from pathlib import Path

FAMILY = "digits"
# from cheap to dear
MODELS = ("digits_linear", "digits_mlp", "digits_cnn", "digits_resnet")
# the largest model, which the cascade is compared with
REFERENCE = MODELS[-1]
EXAMPLE = Path("examples/digits")
REPOSITORY = Path("model_repository")
# its own config in the repository, `<model>/configs/<name>.pbtxt`: Triton's dynamic batching
BASELINE_CONFIG = "baseline"
