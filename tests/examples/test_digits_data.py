from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from examples.digits.data import NUM_CLASSES, NUM_TEST_IMAGES, SIDE, SPLITS, Rows, rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

HELD_OUT = ("search", "calibration", "replay")


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("inputs", "labels", "image_ids"))


def correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1])


@pytest.fixture(scope="module")
def drawn() -> dict[str, Rows]:
    """Enough rows to meet nearly every image of a pool."""
    return {split: rows(split, 2_500) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_arguments_give_the_same_rows(split: Any) -> None:
    assert same(rows(split, 300, seed=5), rows(split, 300, seed=5))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 511, 512])
def test_fewer_rows_are_a_prefix_of_more_rows(split: Any, n: int, drawn: dict[str, Rows]) -> None:
    few, many = rows(split, n), drawn[split]
    assert same(few, Rows(many.inputs[:n], many.labels[:n], many.image_ids[:n]))


def test_changing_rows_that_were_handed_out_changes_no_later_ones() -> None:
    first = rows("search", 8)
    kept = Rows(first.inputs.copy(), first.labels.copy(), first.image_ids.copy())
    first.inputs[:] = first.labels[:] = first.image_ids[:] = 0
    assert same(rows("search", 8), kept)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("n", [0, 1, 300])
def test_shapes_and_types_are_those_promised(split: Any, n: int) -> None:
    part = rows(split, n)
    assert (part.inputs.shape, part.inputs.dtype) == ((n, 1, SIDE, SIDE), np.float32)
    assert (part.labels.shape, part.labels.dtype) == ((n,), np.int64)
    assert (part.image_ids.shape, part.image_ids.dtype) == ((n,), np.int64)


def test_inputs_are_finite_with_paper_near_0_and_ink_near_1(drawn: dict[str, Rows]) -> None:
    inputs = drawn["search"].inputs
    assert np.isfinite(inputs).all()
    assert -4 < inputs.min() < 0
    assert 1 < inputs.max() < 5
    assert 0.0 < np.median(inputs) < 0.3
    assert set(drawn["search"].labels) == set(range(NUM_CLASSES))


def test_an_image_has_one_label_in_every_split(drawn: dict[str, Rows]) -> None:
    ids = np.concatenate([part.image_ids for part in drawn.values()])
    labels = np.concatenate([part.labels for part in drawn.values()])
    assert len(set(zip(ids.tolist(), labels.tolist(), strict=True))) == len(set(ids.tolist()))


def test_training_held_out_and_test_images_are_disjoint(drawn: dict[str, Rows]) -> None:
    pools = {
        "train": set(drawn["train"].image_ids),
        "held out": set().union(*(drawn[split].image_ids for split in HELD_OUT)),
        "test": set(drawn["test"].image_ids),
    }
    for one, other in combinations(pools.values(), 2):
        assert not one & other
    assert len(pools["test"]) == NUM_TEST_IMAGES
    assert len(pools["held out"]) == 360
    assert 900 < len(pools["train"]) <= 1_077


def test_search_calibration_and_replay_draw_from_one_pool(drawn: dict[str, Rows]) -> None:
    for one, other in combinations(HELD_OUT, 2):
        images, others = set(drawn[one].image_ids), set(drawn[other].image_ids)
        assert len(images & others) / len(images | others) > 0.99


def test_search_calibration_and_replay_are_one_population(drawn: dict[str, Rows]) -> None:
    for measure in (np.mean, np.std):
        found = [measure(drawn[split].inputs, axis=(1, 2, 3)) for split in HELD_OUT]
        for one, other in combinations(found, 2):
            standard_error = np.sqrt((one.var() + other.var()) / len(one))
            assert abs(one.mean() - other.mean()) < 4 * standard_error


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_are_independent_streams(one: str, other: str, drawn: dict[str, Rows]) -> None:
    first, second = drawn[one], drawn[other]
    assert np.mean(first.image_ids == second.image_ids) < 0.02
    noise = [part.inputs[:500, 0, 0] for part in (first, second)]  # a line of paper and noise
    assert abs(correlation(*noise)) < 0.1


@pytest.mark.parametrize("split", SPLITS)
def test_seeds_are_independent_streams(split: Any, drawn: dict[str, Rows]) -> None:
    first, second = drawn[split], rows(split, 500, seed=1)
    if split != "test":  # its images come in a fixed order
        assert np.mean(first.image_ids[:500] == second.image_ids) < 0.02
    assert abs(correlation(first.inputs[:500, 0, 0], second.inputs[:, 0, 0])) < 0.1


def test_blocks_of_rows_are_independent(drawn: dict[str, Rows]) -> None:
    part = drawn["search"]
    assert np.mean(part.image_ids[:256] == part.image_ids[256:512]) < 0.05
    assert abs(correlation(part.inputs[:256, 0, 0], part.inputs[256:512, 0, 0])) < 0.1


def test_a_seed_beyond_32_bits_repeats_no_rows_of_another_seed() -> None:
    low = rows("search", 512, seed=3)
    try:
        high = rows("search", 256, seed=2**32 + 3)
    except ValueError:  # refusing such a seed is an answer too
        return
    assert not np.array_equal(low.inputs[256:], high.inputs)


def test_rows_differ_from_one_another() -> None:
    inputs = rows("search", 512).inputs
    assert len(np.unique(inputs.reshape(512, -1), axis=0)) == 512


@pytest.mark.parametrize("split", SPLITS)
def test_every_class_is_about_equally_frequent(split: str, drawn: dict[str, Rows]) -> None:
    shares = np.bincount(drawn[split].labels, minlength=NUM_CLASSES) / len(drawn[split].labels)
    assert shares.min() > 0.07
    assert shares.max() < 0.13


def test_the_test_split_shows_each_image_equally_often_with_a_fresh_distortion() -> None:
    part = rows("test", 2 * NUM_TEST_IMAGES)
    assert (np.unique(part.image_ids, return_counts=True)[1] == 2).all()
    assert np.array_equal(part.image_ids[:NUM_TEST_IMAGES], part.image_ids[NUM_TEST_IMAGES:])
    first, second = np.split(part.inputs, 2)
    assert not (first == second).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("split", ["training", "", "Test", 0])
def test_an_unknown_split_is_refused_with_the_known_ones(split: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown split .*; choose one of train, search, calibration, replay, test"):
        rows(split, 1)


@pytest.mark.parametrize(("n", "seed", "sentence"), [(-1, 0, "n must not be"), (1, -1, "seed must be from 0")])
def test_negative_numbers_are_refused(n: int, seed: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        rows("search", n, seed)
