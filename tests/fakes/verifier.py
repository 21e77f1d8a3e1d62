"""A second opinion on gear plans: plain loops over the JSON, the cluster and the rows, without any of the planner."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from scipy.stats import beta

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.records import Records

Instances = dict[str, dict[str, int]]
# a lower layout is in force up to this share of its highest rate
DOWN_FRAC = 0.8
# of the entries' share of delta, what pays for counting repairs
REPAIR_SHARE = 0.1


@dataclass(frozen=True)
class Device:
    """An endpoint as the cluster file has it, and the bytes of an instance by model, from the profile of its kind."""

    slots: int
    memory_bytes: int | None
    sizes: Mapping[str, int | None]


@dataclass
class Verifier:
    """Checks one family of a plan; `rates` are (rows per second, share of time)."""

    document: dict[str, Any]
    devices: Mapping[str, Device]
    search: Records
    rates: Sequence[tuple[float, float]] | None = None
    calibration: Records | None = None
    family: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        (self.family,) = self.document["families"].values()
        self.entries = {entry["name"]: entry for entry in self.family["ladder"]}
        self.layouts = {layout["name"]: layout["instances"] for layout in self.document["layouts"]}

    def check(self) -> None:
        """Assert all that must hold."""
        assert len(self.entries) == len(self.family["ladder"])
        assert len(self.layouts) == len(self.document["layouts"])
        for instances in self.layouts.values():
            self._fits(instances)
        tops = [self._tiles(layout) for layout in self.layouts]
        assert all(low < high for low, high in pairwise(tops))
        self._entries_say_what_rows_say()
        self._transitions_lead()
        if self.rates is not None:
            self._expected()
        if self.calibration is not None:
            self._certified()

    def gears(self, layout: str) -> list[dict[str, Any]]:
        here = [gear for gear in self.family["gears"] if gear["layout"] == layout]
        return sorted(here, key=lambda gear: gear["min_rate_per_s"])

    def _models(self, gear: Mapping[str, Any]) -> list[str]:
        return [stage["model"] for stage in self.entries[gear["ladder_entry"]]["stages"]]

    def _fits(self, instances: Instances) -> None:
        assert instances.keys() <= self.devices.keys()
        for endpoint, counts in instances.items():
            device = self.devices[endpoint]
            assert all(1 <= count <= device.slots for count in counts.values())
            if device.memory_bytes is not None:
                held = 0
                for model, count in counts.items():
                    size = device.sizes[model]
                    assert size is not None
                    held += count * size
                assert held <= device.memory_bytes

    def _tiles(self, layout: str) -> float:
        """Gears go from 0 to some rate without a gap, and the degraded one takes what is above; their models stand."""
        gears = self.gears(layout)
        assert gears[0]["min_rate_per_s"] == 0.0
        for low, high in pairwise(gears):
            assert low["max_rate_per_s"] == high["min_rate_per_s"] > low["min_rate_per_s"]
        assert [bool(gear.get("degraded")) for gear in gears] == [False] * (len(gears) - 1) + [True]
        assert gears[-1]["max_rate_per_s"] is None
        for gear in gears:
            for model in self._models(gear):
                assert self._stands(model, self.layouts[layout])
                trigger = gear["triggers"][model]
                largest = self.family["models"][model]["max_batch"]
                assert 1 <= trigger["min_batch"] <= trigger["max_batch"] <= largest
        top: float = gears[-1]["min_rate_per_s"]
        return top

    @staticmethod
    def _stands(model: str, instances: Instances) -> bool:
        return any(counts.get(model, 0) > 0 for counts in instances.values())

    def _transitions_lead(self) -> None:
        """Between neighbours, both ways: within memory after every step, and all that serves meanwhile stands."""
        ways = {(each["from_layout"], each["to_layout"]): each for each in self.document.get("transitions", ())}
        wanted = {way for low, high in pairwise(self.layouts) for way in ((low, high), (high, low))}
        assert ways.keys() == wanted
        for (former, target), way in ways.items():
            (meanwhile,) = way["gears"].values()
            (gear,) = [gear for gear in self.gears(former) if gear["name"] == meanwhile]
            now: Instances = {endpoint: dict(counts) for endpoint, counts in self.layouts[former].items()}
            for step in way["steps"]:
                counts = now.setdefault(step["endpoint"], {})
                assert counts.pop(step["model"], 0) == step["present"] != step["wanted"]
                if step["wanted"]:
                    counts[step["model"]] = step["wanted"]
                self._fits(now)
                assert all(self._stands(model, now) for model in self._models(gear))
            for endpoint in self.devices:
                assert now.get(endpoint, {}) == self.layouts[target].get(endpoint, {})

    def _answers(self, entry: Mapping[str, Any], records: Records) -> tuple[list[int], list[int]]:
        """Labels of all rows, and how many rows reach each stage."""
        labels, reached = [], [0] * len(entry["stages"])
        for row in range(len(records.truth)):
            for place, stage in enumerate(entry["stages"]):
                reached[place] += 1
                answers = records.models[stage["model"]]
                threshold = stage.get("threshold")
                if threshold is None or np.float32(answers.certainty[row]) >= np.float32(threshold):
                    labels.append(int(answers.label[row]))
                    break
        return labels, reached

    def _entries_say_what_rows_say(self) -> None:
        truth = self.search.truth.tolist()
        for entry in self.entries.values():
            labels, reached = self._answers(entry, self.search)
            right = sum(label == true for label, true in zip(labels, truth, strict=True))
            assert entry["accuracy"] == pytest.approx(right / len(truth))
            assert entry["reach"] == pytest.approx([rows / len(truth) for rows in reached])

    def _expected(self) -> None:
        assert self.rates is not None
        rows, right, over_time = 0.0, 0.0, 0.0
        shares = {gear["name"]: 0.0 for gear in self.family["gears"]}
        tops = {layout: self.gears(layout)[-1]["min_rate_per_s"] for layout in self.layouts}
        for rate, share in self.rates:
            layout = next((layout for layout, top in tops.items() if rate < DOWN_FRAC * top), list(tops)[-1])
            gear = next(gear for gear in self.gears(layout) if rate < (gear["max_rate_per_s"] or math.inf))
            accuracy = self.entries[gear["ladder_entry"]]["accuracy"]
            shares[gear["name"]] += rate * share
            rows += rate * share
            right += rate * share * accuracy
            over_time += share * accuracy
        found = self.family["expected"]
        assert found["accuracy"] == pytest.approx(right / rows)
        assert found["accuracy_over_time"] == pytest.approx(over_time)
        assert found["gears"] == pytest.approx({name: share / rows for name, share in shares.items()})

    def _certified(self) -> None:
        """Every epsilon follows from counts among the calibration rows, for one number of entries that were tested."""
        assert self.calibration is not None
        certificate, truth = self.family["certificate"], self.calibration.truth.tolist()
        reference = self.calibration.models[self.family["reference_model"]].label.tolist()
        of_reference = [label == true for label, true in zip(reference, truth, strict=True)]
        assert certificate["rows"] == len(truth)
        assert certificate["reference_accuracy"] == pytest.approx(sum(of_reference) / len(truth))
        counts: dict[str, tuple[int, int]] = {}
        for name, entry in self.entries.items():
            if [stage["model"] for stage in entry["stages"]] == [self.family["reference_model"]]:
                assert entry["epsilon"] == 0.0
                continue
            labels, _ = self._answers(entry, self.calibration)
            right = [label == true for label, true in zip(labels, truth, strict=True)]
            pairs = list(zip(of_reference, right, strict=True))
            counts[name] = pairs.count((True, False)), pairs.count((False, True))
        epsilons = {name: self.entries[name]["epsilon"] for name in counts}
        assert any(
            epsilons
            == pytest.approx(
                {
                    name: _epsilon(harm, repaired, len(truth), certificate["delta"] / number)
                    for name, (harm, repaired) in counts.items()
                }
            )
            for number in range(1, 13)
        )
        assert certificate["epsilon"] == max(
            [0.0, *epsilons.values()] if len(counts) < len(self.entries) else epsilons.values()
        )
        if self.rates is not None and (weighted := certificate.get("weighted_epsilon")) is not None:
            of_gear = {gear["name"]: self.entries[gear["ladder_entry"]]["epsilon"] for gear in self.family["gears"]}
            shares = self.family["expected"]["gears"]
            assert weighted == pytest.approx(sum(share * of_gear[name] for name, share in shares.items()))


def _epsilon(harm: int, repaired: int, rows: int, delta: float) -> float:
    """Clopper and Pearson: harm from above, less repairs from below."""
    most = 1.0 if harm == rows else float(beta.ppf(1.0 - (1.0 - REPAIR_SHARE) * delta, harm + 1, rows - harm))
    least = 0.0 if repaired == 0 else float(beta.ppf(REPAIR_SHARE * delta, repaired, rows - repaired + 1))
    return most - least
