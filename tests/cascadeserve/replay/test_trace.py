from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.replay.arrivals import from_trace

REAL = Path(__file__).parents[4] / "shared" / "data" / "traces"


def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def real(name: str) -> Path:
    path = REAL / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.parametrize("text", ["5\n5.5\n7\n", "time\n5\n5.5\n7", "id,arrival\na,5\nb,5.5\nc,7\n\n"])
def test_timestamps_count_from_the_first(tmp_path: Path, text: str) -> None:
    assert from_trace(write(tmp_path, text), rng=rng()).tolist() == [0.0, 0.5, 2.0]


def test_a_column_can_be_named_or_numbered(tmp_path: Path) -> None:
    path = write(tmp_path, "when,sent\n100,1\n200,4\n")
    assert from_trace(path, rng=rng(), column="sent").tolist() == [0.0, 3.0]
    assert from_trace(path, rng=rng(), column="0").tolist() == [0.0, 100.0]
    with pytest.raises(InvalidArtefact, match="no column `x`; it has when, sent"):
        from_trace(path, rng=rng(), column="x")


def test_datetimes_keep_100_nanoseconds(tmp_path: Path) -> None:
    text = "TIMESTAMP,ContextTokens\n2023-11-16 18:17:03.9799600,1\n2023-11-16 18:17:04.0319607,2\n"
    assert from_trace(write(tmp_path, text), rng=rng())[1] == pytest.approx(0.0520007, abs=1e-9)


def test_counts_become_arrivals_inside_their_minute(tmp_path: Path) -> None:
    path = write(tmp_path, "minute,count\n10,1000\n11,0\n13,3000\n")
    times = from_trace(path, rng=rng())
    assert np.histogram(times, bins=[0, 60, 120, 180, 240])[0].tolist() == [1000, 0, 0, 3000]
    scaled = from_trace(path, rng=rng(), duration_s=24.0, rate_per_s=100.0)
    assert np.histogram(scaled, bins=[0, 6, 12, 18, 24])[0] == pytest.approx([600, 0, 0, 1800], rel=0.15)
    assert len(from_trace(path, rng=rng(), rate_per_s=100.0)) == 4000
    assert from_trace(path, rng=rng(), rate_per_s=100.0)[-1] == pytest.approx(40.0, rel=0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5\nx\n7\n", r"trace\.csv: row 2: `x` is neither a number nor a datetime"),
        ("time\n5\n4\n", r"row 3: goes back in time"),
        ("id,time\na,5\nb\n", r"row 3: has only 1 columns"),
        ("minute,count\n1,5\n2,-1\n", r"row 3: count `-1` is no whole number"),
        ("minute,count\n1,5\n1.5,2\n", r"shorter than a minute"),
        ("time\nnan\n", r"row 2: `nan`"),
        ("time\n", r"no request"),
        ("", r"is empty"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidArtefact, match=message):
        from_trace(write(tmp_path, text), rng=rng())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtefact, match="nowhere"):
        from_trace(tmp_path / "nowhere", rng=rng())


def test_a_window_is_cut_out(tmp_path: Path) -> None:
    path = write(tmp_path, "1\n2\n3\n4\n")
    assert from_trace(path, rng=rng(), start="2", end="4").tolist() == [0.0, 1.0]
    with pytest.raises(UsageError, match="start"):
        from_trace(path, rng=rng(), start="soon")


def test_time_is_scaled_to_duration_or_rate(tmp_path: Path) -> None:
    path = write(tmp_path, "0\n1\n4\n")
    assert from_trace(path, rng=rng(), duration_s=2.0).tolist() == [0.0, 0.5, 2.0]
    assert from_trace(path, rng=rng(), rate_per_s=1.5).tolist() == [0.0, 0.5, 2.0]


@pytest.mark.parametrize("rate", [20.0, 300.0])
def test_arrivals_are_thinned_or_multiplied_in_shape(tmp_path: Path, rate: float) -> None:
    shape = np.concatenate([np.linspace(0, 50, 1000), np.linspace(50.01, 100, 4000)])
    path = write(tmp_path, "\n".join(f"{time:.4f}" for time in shape))
    times = from_trace(path, rng=rng(), duration_s=100.0, rate_per_s=rate)
    assert len(times) == 100 * rate
    assert np.all(np.diff(times) >= 0)
    assert np.mean(times > 50.0) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(
    ("name", "count", "rate", "cv"),
    [("AzureLLMInferenceTrace_code.csv", 8819, 2.57, 13.2), ("AzureLLMInferenceTrace_conv.csv", 19366, 5.53, 1.09)],
)
def test_the_azure_traces(name: str, count: int, rate: float, cv: float) -> None:
    path = real(f"azure-llm-2023/{name}")
    times = from_trace(path, rng=rng())
    assert len(times) == count
    assert count / times[-1] == pytest.approx(rate, abs=0.01)
    gaps = np.diff(times)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.01)
    fitted = from_trace(path, rng=rng(), duration_s=60.0, rate_per_s=100.0)
    assert len(fitted) == 6000
    assert fitted[-1] <= 60.0


def test_a_day_of_the_world_cup() -> None:
    path = real("worldcup-1998/invocation_count.csv")
    day = {"start": "1998-06-30 00:00:00", "end": "1998-07-01 00:00:00"}
    times = from_trace(path, rng=rng(), duration_s=1440.0, rate_per_s=50.0, **day)
    assert len(times) == pytest.approx(72_000, rel=0.02)
    assert times[-1] <= 1440.0
    per_minute = np.histogram(times, bins=1440, range=(0, 1440))[0]
    assert per_minute.max() / per_minute.mean() == pytest.approx(4.12, rel=0.2)
