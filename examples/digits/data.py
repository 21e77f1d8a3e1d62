"""Rows for the digits family: scikit-learn's handwritten digits, enlarged to 32 x 32 and distorted.

The 1,797 images are divided once, by class and with a fixed seed, into three pools that share no image:

    training pool   1,077 images   "train"
    held-out pool     360 images   "search", "calibration", "replay"
    test pool         360 images   "test"

**The certificate's population.** A row of `search`, `calibration` or `replay` is drawn independently of all others: an
image of the held-out pool, uniformly and *with replacement*, then a fresh distortion. The three splits are independent
streams of that one generator, hence exchangeable, and a bound from calibration rows speaks about replay rows. It speaks
about this generator over these 360 images, not about handwriting at large; `test` shows what happens on other images,
and `image_ids` lets a reader group the rows of one image.

A distortion has a severity, uniform on [0, 1], that scales everything at once: rotation, size, shear, shift, the size
of a grey patch, the noise. So most rows are easy and some are very hard, which is what a cascade lives on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from numpy.typing import NDArray

Split = Literal["train", "search", "calibration", "replay", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SIDE = 32
NUM_CLASSES = 10
NUM_TEST_IMAGES = 360
_NUM_HELD_OUT_IMAGES = 360

# Rows are made in blocks, each from its own random stream: fewer rows are then always a prefix of more rows, and the
# working set of a block (a few MB) stays in the cache.
_BLOCK = 256
_DIVISION_SEED = 20240
_SEEDS = 1 << 32

# Full severity. Lengths are shares of the image's side, angles are radians, grey values run from 0 to 1.
_ROTATION = 0.60
_LOG_SCALE = 0.26
_SHEAR = 0.34
_SHIFT = 0.10
_PATCH = 0.42
_NOISE = 0.50
# An undistorted digit covers this share of the side, so that a shift does not push it over the edge.
_EXTENT = 0.84


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one split.

    Attributes:
        inputs: float32 [n, 1, 32, 32], about 0 (paper) to 1 (ink), noise reaching beyond both.
        labels: int64 [n], 0 to 9.
        image_ids: int64 [n], the index of the row's image in scikit-learn's set: the group of dependent rows.

    """

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    image_ids: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Images:
    """All images, enlarged, with a ring of paper around each; and the three pools of their indices."""

    padded: NDArray[np.float32]  # [1797, 34, 34]
    labels: NDArray[np.int64]  # [1797]
    train: NDArray[np.int64]
    held_out: NDArray[np.int64]
    test: NDArray[np.int64]

    def pool(self, split: Split) -> NDArray[np.int64]:
        if split == "train":
            return self.train
        return self.test if split == "test" else self.held_out


@cache
def _images() -> _Images:
    bundle = load_digits()
    small = bundle.images.astype(np.float64) / 16.0
    labels = bundle.target.astype(np.int64)
    factor = SIDE // small.shape[1]
    large = ndimage.zoom(small, (1, factor, factor), order=3, mode="grid-constant", grid_mode=True)
    padded = np.pad(np.clip(large, 0.0, 1.0).astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    test, held_out, train = _divide(labels, (NUM_TEST_IMAGES, _NUM_HELD_OUT_IMAGES))
    return _Images(padded=padded, labels=labels, train=train, held_out=held_out, test=test)


def _divide(labels: NDArray[np.int64], sizes: tuple[int, int]) -> tuple[NDArray[np.int64], ...]:
    """Divide indices into pools of `sizes` and the remainder, with the classes spread evenly over all of them."""
    rng = np.random.default_rng(_DIVISION_SEED)
    shuffled = rng.permutation(len(labels))
    position = np.empty(len(labels), dtype=np.float64)
    for label in range(NUM_CLASSES):
        members = shuffled[labels[shuffled] == label]
        # Every class runs evenly over [0, 1); cutting that line into stretches therefore cuts each class in proportion.
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    order = np.argsort(position, kind="stable")
    return tuple(np.sort(part) for part in np.split(order, np.cumsum(sizes)))


def rows(split: Split, n: int, seed: int = 0) -> Rows:
    """Make the first `n` rows of a split; the same arguments always give the same rows.

    Rows of `train`, `search`, `calibration` and `replay` are independent draws (see the module). Row i of `test` is a
    fresh distortion of test image i modulo `NUM_TEST_IMAGES`, so a multiple of 360 shows each image equally often.
    Fewer rows are a prefix of more rows. Different splits and different seeds are independent streams.

    Raises:
        ValueError: the split is unknown, `n` is negative, or `seed` is outside 0 .. 2^32 - 1.

    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    if not 0 <= seed < _SEEDS:  # a larger one would take the place of another seed's blocks
        raise ValueError(f"seed must be from 0 to {_SEEDS - 1}, got {seed}")
    images = _images()
    pool = images.pool(split)
    inputs = np.empty((n, 1, SIDE, SIDE), dtype=np.float32)
    image_ids = np.empty(n, dtype=np.int64)
    for block, start in enumerate(range(0, n, _BLOCK)):
        rng = np.random.default_rng([SPLITS.index(split), seed, block])
        chosen = rng.integers(len(pool), size=_BLOCK)
        if split == "test":
            chosen = (start + np.arange(_BLOCK)) % len(pool)
        stop = min(start + _BLOCK, n)
        ids = pool[chosen]
        inputs[start:stop, 0] = _distort(images.padded, ids, rng)[: stop - start]
        image_ids[start:stop] = ids[: stop - start]
    return Rows(inputs=inputs, labels=images.labels[image_ids], image_ids=image_ids)


def _distort(padded: NDArray[np.float32], ids: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Make one fresh distortion per index; [len(ids), 32, 32]."""
    severity = rng.random(len(ids))
    warped = _sample(padded, ids, *_source_points(severity, rng))
    _cover(warped, severity, rng)
    noise = rng.standard_normal(warped.shape, dtype=np.float32)
    noise *= (_NOISE * severity).astype(np.float32)[:, None, None]
    warped += noise
    return warped


def _source_points(
    severity: NDArray[np.float64], rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Map each target pixel to a point (row, column) of the padded source image; two arrays [n, 32, 32]."""
    rotation, log_scale, shear, shift_row, shift_column = rng.uniform(-1.0, 1.0, (5, len(severity))) * severity
    angle = rotation * _ROTATION
    # From target to source: enlarging the digit shrinks the step through its source.
    step = np.exp(-log_scale * _LOG_SCALE) / _EXTENT
    cos, sin, slant = np.cos(angle) * step, np.sin(angle) * step, shear * _SHEAR
    matrix = np.stack([cos, -sin, sin + slant * cos, cos - slant * sin], axis=1).astype(np.float32)
    centre = (SIDE - 1) / 2.0
    axis = np.arange(SIDE, dtype=np.float32) - np.float32(centre)
    to_row = (axis[None, :] - (shift_row * _SHIFT * SIDE).astype(np.float32)[:, None])[:, :, None]
    to_column = (axis[None, :] - (shift_column * _SHIFT * SIDE).astype(np.float32)[:, None])[:, None, :]
    a, b, c, d = (matrix[:, i, None, None] for i in range(4))
    offset = np.float32(centre + 1.0)  # one pixel of padding
    return a * to_row + b * to_column + offset, c * to_row + d * to_column + offset


def _sample(
    padded: NDArray[np.float32], ids: NDArray[np.int64], row: NDArray[np.float32], column: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Read source images at fractional points, bilinearly; points outside fall on the ring of paper."""
    width = padded.shape[-1]
    # The upper limit stays below the last pixel, so that the neighbour at + 1 exists.
    limit = np.float32(width - 1 - 1e-3)
    np.clip(row, 0.0, limit, out=row)
    np.clip(column, 0.0, limit, out=column)
    top, left = row.astype(np.int32), column.astype(np.int32)
    row -= top
    column -= left
    source = padded[ids].reshape(-1)
    corner = top * width + left + (np.arange(len(ids), dtype=np.int32) * padded[0].size)[:, None, None]
    upper = source[corner] * (1 - column) + source[corner + 1] * column
    lower = source[corner + width] * (1 - column) + source[corner + width + 1] * column
    return upper * (1 - row) + lower * row


def _cover(warped: NDArray[np.float32], severity: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Lay one grey rectangle over each image, in place; its sides grow with severity."""
    grey = rng.random(len(severity), dtype=np.float32)
    axis = np.arange(SIDE)
    inside = []
    for centre, side in zip(
        rng.uniform(0, SIDE, (2, len(severity))),
        rng.uniform(0, _PATCH * SIDE, (2, len(severity))) * severity,
        strict=True,
    ):
        inside.append(np.abs(axis[None, :] - centre[:, None]) < side[:, None] / 2)
    covered = inside[0][:, :, None] & inside[1][:, None, :]
    np.copyto(warped, grey[:, None, None], where=covered)
