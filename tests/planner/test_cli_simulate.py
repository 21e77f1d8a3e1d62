from __future__ import annotations

import json
import re
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from cascadeserve import cli
from cascadeserve.artefacts import write_json
from planner.records import CalibrationRecords, HeldOutRecords, Provenance, SearchRecords
from planner.records_files import read_search, write_records
from tests.fakes import tiny
from tests.fakes.plans import make_profile, make_records

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

BUSY_S = {"small": [[1, 0.001], [64, 0.002]], "large": [[1, 0.002], [64, 0.010]]}
CLUSTER = """schema_version = 1
[[endpoints]]
name = "a"
grpc = "127.0.0.1:8001"
http = "127.0.0.1:8000"
metrics = "127.0.0.1:8002"
device = { kind = "cpu", cores = [0] }
"""
STEPS = "--steps=10x60,5x600,15x60"


def as_split(records: SearchRecords, kind: type[Any]) -> Any:
    return kind(**{field.name: getattr(records, field.name) for field in fields(records)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Plan, profile, cluster and records of the tiny family; a tenth of the rows is answered wrongly."""
    write_json(tmp_path / "plan.json", tiny.plan_document())
    write_json(tmp_path / "profile.json", make_profile(BUSY_S))
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    certainty = np.random.default_rng(0).random(1000)
    truth = (np.arange(1000) % 10 == 0).astype(np.int64).tolist()
    records = make_records({"small": certainty + 0.2, "large": certainty}, truth=truth)
    write_records(tmp_path / "search.npz", records)
    write_records(tmp_path / "test.npz", as_split(records, HeldOutRecords))
    write_records(tmp_path / "calibration.npz", as_split(records, CalibrationRecords))
    return tmp_path


def run(
    folder: Path, capsys: pytest.CaptureFixture[str], *options: str, records: str = "search.npz"
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    code = 0
    try:
        cli.main(
            [
                "simulate",
                str(folder / "plan.json"),
                f"--profile={folder / 'profile.json'}",
                f"--cluster={folder / 'cluster.toml'}",
                f"--records={folder / records}",
                *options,
            ]
        )
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


def change_plan(folder: Path, change: Any) -> None:
    document = tiny.plan_document()
    change(document)
    write_json(folder / "plan.json", document)


def test_a_run_is_shown_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(folder, capsys, STEPS, f"--report={folder / 'report.json'}")
    assert code == 0
    for shown in ("p50 / p95 / p99", "goodput", "accuracy", "refused", "calm", "busy", "2 switches", "small batches"):
        assert shown in output
    report = json.loads((folder / "report.json").read_bytes())
    ledger = report["ledger"]
    assert report["source"] == "simulator"
    assert (report["duration_s"], report["slo_s"]) == (30.0, 0.5)
    assert ledger["answered_correct"] + ledger["answered_wrong"] + ledger["refused"] == ledger["sent"]
    assert report["accuracy"] == pytest.approx(0.9, abs=0.02)
    assert ledger["answered_correct"] / ledger["sent"] == pytest.approx(report["accuracy"])
    assert [span["gear"] for span in report["gears"]] == ["calm", "busy", "calm"]
    assert sum(stage["rows"] for stage in report["stages"]) == report["rows_sent"]
    assert report["stages"][1]["share"] == pytest.approx(0.3, abs=0.03)


def test_the_same_options_give_the_same_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        files = (folder / f"{name}.json", folder / f"{name}.svg")
        assert run(folder, capsys, STEPS, f"--seed={seed}", f"--report={files[0]}", f"--plot={files[1]}")[0] == 0
        written.append([file.read_bytes() for file in files])
    same, again, other = written
    assert same == again
    assert same[0] != other[0]
    assert same[1] != other[1]


def test_rows_of_the_test_split_in_requests_of_several(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder / "report.json"
    options = ("--rate=200", "--duration=20", "--process=gamma", "--cv=2", "--rows-per-request=1-8")
    code, _, _ = run(folder, capsys, *options, f"--report={report}", records="test.npz")
    assert code == 0
    found = json.loads(report.read_bytes())
    assert 3.5 < found["rows_sent"] / found["ledger"]["sent"] < 5.5


def test_a_trace_is_stretched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "trace.csv").write_text("\n".join(["seconds", *(str(second) for second in range(101))]) + "\n")
    report = folder / "report.json"
    assert run(folder, capsys, f"--trace={folder / 'trace.csv'}", "--duration=10", f"--report={report}")[0] == 0
    assert json.loads(report.read_bytes())["ledger"]["sent"] == 101


def test_a_held_gear_stays(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(folder, capsys, STEPS, "--gear=calm")
    assert code == 0
    assert "calm 100.00%" in output
    assert "0 switches" in output


def test_what_is_late_is_refused_and_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder / "report.json"
    options = ("--rate=3000", "--duration=5", "--gear=calm", "--rows-per-request=64", "--timeout=0.004")
    assert run(folder, capsys, *options, f"--report={report}", f"--plot={folder / 'plot.png'}")[0] == 0
    found = json.loads(report.read_bytes())
    assert found["ledger"]["refused"] > 0
    assert found["p99_s"] <= 0.004 + 1e-9
    assert found["goodput"] == pytest.approx(1.0 - found["ledger"]["refused"] / found["ledger"]["sent"])


def test_what_the_next_stage_would_answer_late_is_answered_before_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stage_shares(timeout_s: float) -> list[float]:
        report = folder / "report.json"
        options = ("--rate=3000", "--duration=5", "--gear=calm", "--rows-per-request=64", f"--timeout={timeout_s}")
        assert run(folder, capsys, *options, f"--report={report}")[0] == 0
        found = json.loads(report.read_bytes())
        assert found["ledger"]["refused"] < 0.02 * found["ledger"]["sent"]
        assert found["p99_s"] <= timeout_s + 1e-9
        return [stage["share"] for stage in found["stages"]]

    assert stage_shares(0.02)[0] > stage_shares(1.0)[0]


def test_nothing_answered_is_a_report_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, plot = folder / "report.json", folder / "plot.svg"
    options = ("--rate=50", "--duration=3", "--timeout=0.0001", f"--report={report}", f"--plot={plot}")
    assert run(folder, capsys, *options)[0] == 0
    found = json.loads(report.read_bytes())
    assert found["p95_s"] is None
    assert found["accuracy"] is None
    assert found["gears"] == []
    assert plot.read_bytes().startswith(b"<?xml")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_is_drawn(folder: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    plot = folder / "deep" / f"plot{suffix}"
    # up to the layout of the high rates and back
    assert run(folder, capsys, "--steps=5x100,20x2000,40x50", f"--plot={plot}")[0] == 0
    starts = {".png": b"\x89PNG", ".svg": b"<?xml"}
    assert plot.read_bytes().startswith(starts[suffix])


def two_families(document: dict[str, Any]) -> None:
    other = json.loads(json.dumps(document["families"]["family"]).replace("small", "tiny").replace("large", "huge"))
    document["families"]["other"] = other
    for layout in document["layouts"]:
        layout["instances"]["a"] |= {"tiny": 1, "huge": 1}


def test_one_of_several_families(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_plan(folder, two_families)
    code, _, errors = run(folder, capsys, STEPS)
    assert code == 2
    assert "--family with one of family, other" in errors
    assert run(folder, capsys, STEPS, "--family=family")[0] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "the load is not given"),
        (["--rate=0", "--duration=5"], "rate_per_s is 0.0"),
        ([STEPS, "--rate=5"], "--steps holds rates and durations itself"),
        ([STEPS, "--gear=turbo"], "--gear takes one of calm, busy, wide, overload"),
        ([STEPS, "--family=other"], "no family 'other'; say --family with one of family"),
        ([STEPS, "--timeout=0"], "--timeout is 0.0"),
        ([STEPS, "--timeout=nan"], "--timeout is nan"),
        ([STEPS, "--timeout=inf"], "--timeout is inf"),
        ([STEPS, "--timeout=1e300"], "load and deadline of a request together last 1e+300 s"),
        (["--rate=inf", "--duration=5"], "rate_per_s is inf"),
        (["--rate=1", "--duration=1e12"], "this load lasts 1e+12 s, but a load may last at most 2592000 s (30 days)"),
        (["--rate=5e7", "--duration=1"], "this load has about 5e+07 requests or rows"),
        (["--rate=1e9", "--duration=100", "--rows-per-request=999999999"], "requests or rows"),
        (["--rate=100", "--duration=5", "--process=gamma", "--cv=1e200"], "cv is 1e+200; it must lie between"),
        (["--rate=100", "--duration=5", "--process=gamma", "--cv=1e-200"], "cv is 1e-200; it must lie between"),
        (
            ["--rate=1", "--duration=5", "--process=bursty", "--base-dwell=1e-9", "--burst-dwell=1e-9"],
            "--base-dwell and --burst-dwell change the rate about 5e+09 times",
        ),
        (["--steps=5x9999999"], "this load has about 5e+07 requests or rows, but a load may have at most 20,000,000"),
        ([f"--steps={'9' * 400}x1"], "this load lasts inf s"),
        ([STEPS, "--rows-per-request=0"], "rows per request `0`"),
        ([STEPS, "--plot=timeline.pdf"], "is written as .svg or .png"),
        (["--trace=nowhere.csv"], "nowhere.csv: cannot be read"),
        (["--rate=0.001", "--duration=1"], "no request at all"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    code, output, errors = run(folder, capsys, *options)
    assert code == 2
    assert sentence in errors
    assert "Traceback" not in errors
    assert output == ""


@pytest.mark.parametrize(
    ("trace", "options", "sentence"),
    [
        ("0\n", [], "all requests of this load come at one moment; give a trace with more than one time"),
        ("7\n7\n7\n", [], "all requests of this load come at one moment"),
        ("7\n7\n", ["--duration=5"], "all timestamps of the trace are equal"),
        ("0\n1e12\n", [], "trace.csv lasts 1e+12 s, but a load may last at most"),
        ("0\n1\n", ["--rate=1e-9"], "trace.csv lasts 2e+09 s"),
        ("0\n1\n", ["--rate=1e9", "--duration=5"], "trace.csv has about 5e+09 requests or rows"),
        ("0\n1e300\n", [], "trace.csv: row 2: `1e300` is too far from 0"),
        ("minute,count\n0,1\n1,999999999\n", [], "trace.csv has about 1e+09 requests or rows"),
        ("minute,count\n0,1\n1,99999999999999999999\n", [], "trace.csv: row 3: count is more than the 1,000,000,000"),
    ],
)
def test_a_trace_that_makes_no_load_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], trace: str, options: list[str], sentence: str
) -> None:
    (folder / "trace.csv").write_text(trace)
    code, output, errors = run(folder, capsys, f"--trace={folder / 'trace.csv'}", *options)
    assert (code, output) == (2, "")
    assert sentence in errors
    assert errors.count("\n") == 1


def test_calibration_rows_are_not_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(folder, capsys, STEPS, records="calibration.npz")
    assert code == 2
    assert "calibration.npz: holds calibration rows, which only a certificate looks at" in errors


def test_wrong_files_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(folder, capsys, STEPS, records="plan.json")
    assert (code, "plan.json: is no .npz file" in errors) == (2, True)
    code, _, errors = run(folder, capsys, STEPS, records="missing.npz")
    assert (code, "missing.npz: cannot be read" in errors) == (2, True)
    (folder / "cluster.toml").write_text(CLUSTER.replace('"a"', '"b"'))
    code, _, errors = run(folder, capsys, STEPS)
    assert (code, "is no endpoint of the cluster" in errors) == (2, True)


def test_a_profile_that_lacks_a_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(folder / "profile.json", make_profile({"small": BUSY_S["small"]}))
    code, _, errors = run(folder, capsys, STEPS)
    assert (code, "model 'large' is in the records but not in the profile" in errors) == (2, True)


def other_family(folder: Path) -> None:
    write_records(folder / "search.npz", replace(read_search(folder / "search.npz"), family="animals"))


def other_model(folder: Path) -> None:
    write_records(folder / "search.npz", make_records({"small": [0.5] * 10}))


def changed_model(folder: Path) -> None:
    records = read_search(folder / "search.npz")
    answers = replace(records.models["large"], provenance=Provenance(digest="sha256:old"))
    write_records(folder / "search.npz", replace(records, models=records.models | {"large": answers}))
    document = msgspec.to_builtins(make_profile(BUSY_S))
    document["models"]["large"]["digest"] = "sha256:new"
    write_json(folder / "profile.json", document)


def on_gpu(folder: Path) -> None:
    (folder / "cluster.toml").write_text(CLUSTER.replace('{ kind = "cpu", cores = [0] }', '{ kind = "gpu" }'))


def other_slots(folder: Path) -> None:
    write_json(folder / "profile.json", make_profile(BUSY_S, slots=2))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (other_family, "the records are of family 'animals', but 'family' is wanted"),
        (other_model, "model 'large' is not in the records, which hold small"),
        (changed_model, "model 'large' changed between recording and profiling"),
        (on_gpu, "endpoint 'a' is of device kind 'gpu', but the profiles are of cpu"),
        (other_slots, "endpoint 'a' has 1 slots, but the profile of its device kind 'cpu' was measured with 2"),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], sentence: str
) -> None:
    change(folder)
    code, output, errors = run(folder, capsys, STEPS)
    assert (code, output) == (2, "")
    assert sentence in errors
    assert errors.count("\n") == 1


def test_every_endpoint_is_simulated_on_the_profile_of_its_kind(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = CLUSTER.replace("schema_version = 1\n", "").replace('"a"', '"b"').replace(":80", ":90")
    (folder / "cluster.toml").write_text(CLUSTER + second + 'device_kind = "l4"\n')
    fast = {model: [[rows, busy_s / 4] for rows, busy_s in points] for model, points in BUSY_S.items()}
    write_json(folder / "l4.json", msgspec.structs.replace(make_profile(fast), device_kind="l4"))
    write_json(folder / "plan.json", tiny.plan_document(("a", "b")))
    code, output, _ = run(folder, capsys, STEPS, f"--profile={folder / 'l4.json'}")
    assert code == 0
    busy = dict(re.findall(r"(\w) busy\W+([\d.]+)%", output))
    assert float(busy["b"]) < 0.4 * float(busy["a"])


def test_a_missing_package_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, errors = run(folder, capsys, STEPS, f"--plot={folder / 'plot.svg'}")
    assert code == 2
    assert "cascadeserve[planner]" in errors


def test_a_certified_plan_counts_answers_without_a_bound(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def certify(document: dict[str, Any]) -> None:
        family = document["families"]["family"]
        family["ladder"][0]["epsilon"] = 0.0
        family["certificate"] = {
            "epsilon": 0.0,
            "delta": 0.05,
            "rows": 100,
            "method": "clopper_pearson",
            "ladder_digest": "sha256:0",
            "records_digest": "sha256:0",
            "reference_accuracy": 0.9,
        }

    change_plan(folder, certify)
    report = folder / "report.json"
    assert run(folder, capsys, "--rate=50", "--duration=5", f"--report={report}")[0] == 0
    found = msgspec.json.decode(report.read_bytes())
    # all gears use the cascade, which has no bound
    assert found["uncertified"] == found["ledger"]["sent"] > 0


def test_a_trace_for_perfetto(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trace, report = folder / "deep" / "run.json", folder / "report.json"
    code, output, _ = run(folder, capsys, STEPS, f"--chrome-trace={trace}", f"--report={report}")
    assert (code, "holds only" in output) == (0, False)
    document = json.loads(trace.read_bytes())
    assert document["otherData"] == {
        "made_by": "cascadeserve simulate", "plan": "tiny", "family": "family", "complete": True,
        "covers_s": pytest.approx(30.0, abs=1.0),
    }  # fmt: skip
    sent = sum(event["args"]["rows"] for event in document["traceEvents"] if event.get("cat") == "batch")
    stages = json.loads(report.read_bytes())["stages"]
    # a row that stage k answered was in k + 1 batches
    assert sent == sum((stage["stage"] + 1) * stage["rows"] for stage in stages)
    monkeypatch.setattr("planner.cli_simulate.MOST", 50)
    code, output, _ = run(folder, capsys, STEPS, f"--chrome-trace={trace}")
    assert code == 0
    assert "run.json holds only the first" in " ".join(output.split())
    assert json.loads(trace.read_bytes())["otherData"]["complete"] is False
