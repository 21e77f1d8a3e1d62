"""The config that Triton's own dynamic batching is measured with."""

from __future__ import annotations

from pathlib import Path

from cascadeserve.demo.family import BASELINE_CONFIG, REFERENCE
from cascadeserve.endpoint_config import endpoint_config_path
from cascadeserve.triton_config import config_digest, instance_count, parse_config

REPOSITORY = Path(__file__).parents[3] / "model_repository"


def test_the_baseline_is_the_same_model_with_dynamic_batching_and_nothing_else() -> None:
    own = parse_config((REPOSITORY / REFERENCE / "config.pbtxt").read_text())
    baseline = parse_config(endpoint_config_path(REPOSITORY, REFERENCE, BASELINE_CONFIG).read_text())
    assert baseline.HasField("dynamic_batching")
    assert instance_count(baseline) == instance_count(own) == 1
    baseline.ClearField("dynamic_batching")
    assert config_digest(baseline) == config_digest(own)
