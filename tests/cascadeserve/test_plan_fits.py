from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascadeserve.errors import InvalidArtefact
from cascadeserve.plan_fits import check_plan_fits_repository
from cascadeserve.triton_config import model_digest
from tests.fakes.tiny import plan, plan_document, write_repository, write_version

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path)


def test_the_tiny_plan_fits_the_tiny_repository(repository: Path) -> None:
    check_plan_fits_repository(plan(), repository, path=repository)


def test_a_batch_that_the_model_does_not_take_is_refused(repository: Path) -> None:
    document = plan_document()
    document["families"]["family"]["models"]["large"]["max_batch"] = 128
    with pytest.raises(InvalidArtefact, match=r"\$\.families\.family\.models\.large\.max_batch: is 128") as caught:
        check_plan_fits_repository(plan(document), repository, path=repository / "plan.json")
    assert "plan.json" in str(caught.value)


def test_a_model_that_is_not_there_is_refused(repository: Path) -> None:
    (repository / "large" / "config.pbtxt").unlink()
    with pytest.raises(InvalidArtefact, match=r"models\.large: is not in"):
        check_plan_fits_repository(plan(), repository, path=repository)


def test_other_inputs_are_refused(repository: Path) -> None:
    document = plan_document()
    document["families"]["family"]["inputs"][0]["datatype"] = "FP64"
    with pytest.raises(InvalidArtefact, match=r"\.inputs: differ from those of model 'small' .*: x FP32 \[3\]"):
        check_plan_fits_repository(plan(document), repository, path=repository)


def test_a_version_that_is_not_there_is_refused(repository: Path) -> None:
    document = plan_document()
    document["families"]["family"]["models"]["small"]["version"] = 2
    with pytest.raises(InvalidArtefact, match=r"models\.small\.version: is 2, but the versions in .*small are 1"):
        check_plan_fits_repository(plan(document), repository, path=repository)
    write_version(repository, "small", 2)
    check_plan_fits_repository(plan(document), repository, path=repository)


def test_an_ensemble_is_made_of_what_the_plan_says(repository: Path) -> None:
    document = plan_document()
    document["families"]["family"]["models"]["large"]["composed_of"] = {"tokens": 1, "classifier": 1}
    with pytest.raises(InvalidArtefact, match=r"models\.large\.composed_of: does not fit .* is no ensemble"):
        check_plan_fits_repository(plan(document), repository, path=repository)


def test_a_model_that_is_not_the_one_that_was_profiled_is_refused(repository: Path) -> None:
    document = plan_document()
    document["families"]["family"]["models"]["small"]["digest"] = model_digest(repository / "small")
    check_plan_fits_repository(plan(document), repository, path=repository)
    (repository / "small" / "1" / "model.onnx").write_bytes(b"other weights")
    with pytest.raises(InvalidArtefact, match=r"models\.small\.digest: .* holds another one now"):
        check_plan_fits_repository(plan(document), repository, path=repository)
