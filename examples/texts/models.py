"""The two classifiers of the texts family; both take hashed counts, float32 [n, BUCKETS], and return logits [n, 6]."""

from __future__ import annotations

from torch import nn

from examples.texts import grams, words
from examples.texts.data import PACKAGES

_HIDDEN = 96


def build_words() -> nn.Module:
    """One linear map from counts of words."""
    return nn.Linear(words.BUCKETS, len(PACKAGES))


def build_grams() -> nn.Module:
    """One hidden layer over counts of runs of characters; half of what it sees is dropped in training."""
    hidden = nn.Linear(grams.BUCKETS, _HIDDEN)
    return nn.Sequential(nn.Dropout(0.5), hidden, nn.ReLU(), nn.Dropout(0.5), nn.Linear(_HIDDEN, len(PACKAGES)))
