"""What of an endpoint's config may be changed by hand: instances and versions, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascadeserve.errors import InvalidArtefact
from cascadeserve.local_triton.working_copy import prepare_working_copy
from cascadeserve.triton_config import instance_count, parse_config
from orchestrator.instance_config import InstanceConfig
from tests.fakes.tiny import write_repository
from tests.orchestrator.conftest import cluster

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return prepare_working_copy(write_repository(source), cluster(("a",)), tmp_path / "state")


@pytest.mark.parametrize(
    "broken",
    [
        lambda _: "",
        lambda text: text[: text.index("output")],
        lambda text: text.replace("onnxruntime", "python"),
        lambda text: text.replace("64", "8"),
        lambda text: text + 'parameters { key: "more" value { string_value: "1" } }\n',
    ],
    ids=["emptied", "half of it", "another backend", "other batches", "a parameter more"],
)
def test_a_config_that_is_not_the_models_is_refused_and_stays(repository: Path, broken: Callable[[str], str]) -> None:
    path = repository / "large" / "configs" / "a.pbtxt"
    text = broken(path.read_text())
    path.write_text(text)
    with pytest.raises(InvalidArtefact) as refused:
        InstanceConfig(repository, cluster(("a",))).write("a", "large", 2, {1})
    assert str(refused.value) == (
        f"{path}: differs from large/config.pbtxt in more than instances and versions; restore what was changed"
    )
    assert path.read_text() == text


def test_a_broken_config_of_the_model_itself_is_named(repository: Path) -> None:
    own = repository / "large" / "config.pbtxt"
    own.write_text("not a config {")
    with pytest.raises(InvalidArtefact, match=r"large/config\.pbtxt: is no Triton model config"):
        InstanceConfig(repository, cluster(("a",))).write("a", "large", 2, {1})


def test_instances_and_versions_may_have_been_changed(repository: Path) -> None:
    path = repository / "large" / "configs" / "a.pbtxt"
    path.write_text(
        path.read_text().replace("count: 1", "count: 7") + "version_policy { latest { num_versions: 3 } }\n"
    )
    InstanceConfig(repository, cluster(("a",))).write("a", "large", 2, {1})
    config = parse_config(path.read_text())
    assert instance_count(config) == 2
    assert list(config.version_policy.specific.versions) == [1]
