"""The documentation builds, every link in it leads somewhere, and its generated pages say what the code says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from cascadeserve.cli import _COMMANDS, root

ROOT = Path(__file__).parent.parent
PAGES = sorted({ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")})
# a line of a code block, with those that it goes on in, or words in backticks
SHOWN = re.compile(r"(?:^ *|`)cascadeserve ([a-z-]+)((?:[^\n`]*\\\n)*[^\n`]*)", re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    # strict: a link or an anchor that leads nowhere fails the build
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_command_is_in_the_reference(site: Path) -> None:
    page = (site / "reference" / "cli.html").read_text()
    for command in _COMMANDS:
        assert f'id="{command}"' in page


def test_files_have_their_schemas(site: Path) -> None:
    page = (site / "reference" / "files.html").read_text()
    assert page.count("<details") == 5
    assert "{{" not in page


def test_metrics_are_listed(site: Path) -> None:
    page = (site / "reference" / "metrics.html").read_text()
    for name in ("cascadeserve_requests_total", "cascadeserve_gear_in_force", "cascadeserve_batch_seconds"):
        assert name in page


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "fonts.googleapis" not in text
        assert "???" not in text, f"{page.name} has a block that no extension renders"
        assert '<script src="http' not in text


def test_commands_that_pages_show_exist_with_these_options() -> None:
    known = {}
    with click.Context(root) as context:
        for name in _COMMANDS:
            command = root.get_command(context, name)
            assert command is not None
            known[name] = {option for each in command.params for option in each.opts} | {"--help"}
    shown = [(page, found) for page in PAGES for found in SHOWN.finditer(page.read_text())]
    assert len(shown) > 50
    for page, found in shown:
        assert found[1] in known, f"{page.name}: {found[0]}"
        options = set(re.findall(r"(?<!\S)--[a-z][a-z-]*", found[2].partition(" -- ")[0]))
        assert options <= known[found[1]], f"{page.name}: {found[0]}"


def test_links_of_the_readme_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).is_file()] == []


RESULTS = ROOT / "benchmarks" / "results"
MS, PERCENT = 1e3, 1e2
# page, its words around a figure, the result, where in it, scale: a page is not older than what it quotes
QUOTED = [
    ("performance.md", "| HTTP | 1 | 2.20 ms | 178 µs | {:.1f} |", "gateway_cost", "http/1/cpu_ratio", 1),
    (
        "performance.md",
        "| | **32** | **311 µs** | **133 µs** | **{:.1f}** | 4 |",
        "gateway_cost",
        "http/32/cpu_ratio",
        1,
    ),
    (
        "performance.md",
        "| | **32** | **825 µs** | **451 µs** | **{:.1f}** | 2.5 |",
        "gateway_cost",
        "grpc/32/cpu_ratio",
        1,
    ),
    ("performance.md", "The orchestrator adds {:.2f} ms", "gateway", "added_p50_s", MS),
    ("performance.md", "from {:.2f} to", "gateway", "added_p50_range_s/0", MS),
    ("performance.md", "to {:.2f} ms over five pairs", "gateway", "added_p50_range_s/1", MS),
    ("performance.md", "late at {:.1f} % of the moments", "isolation", "loop_lag/within_5_ms", PERCENT),
    ("performance.md", "at most 1 ms at {:.0f} %", "isolation", "loop_lag/share_within_s/0.001", PERCENT),
    (
        "performance.md",
        "| World Cup | gears of cascades | {:.1f} % | 98.2 % | 97.7 % |",
        "bursty",
        "traces/worldcup/policies/cascade/goodput",
        PERCENT,
    ),
    (
        "performance.md",
        "| World Cup | gears of cascades | 99.4 % | {:.1f} % | 97.7 % |",
        "bursty",
        "traces/worldcup/policies/cascade/accuracy",
        PERCENT,
    ),
    (
        "performance.md",
        "| World Cup | gears of cascades | 99.4 % | 98.2 % | {:.1f} % |",
        "bursty",
        "traces/worldcup/policies/cascade/right_in_time",
        PERCENT,
    ),
    (
        "performance.md",
        "| Azure | gears of cascades | {:.1f} % | 98.1 % | 95.7 % |",
        "bursty",
        "traces/azure/policies/cascade/goodput",
        PERCENT,
    ),
    (
        "performance.md",
        "| Azure | gears of cascades | 97.4 % | {:.1f} % | 95.7 % |",
        "bursty",
        "traces/azure/policies/cascade/accuracy",
        PERCENT,
    ),
    (
        "performance.md",
        "| Azure | gears of cascades | 97.4 % | 98.1 % | {:.1f} % |",
        "bursty",
        "traces/azure/policies/cascade/right_in_time",
        PERCENT,
    ),
    ("performance.md", "| socket writes | {:.0f} % |", "time_shares", "shares/socket writes", PERCENT),
    ("performance.md", "| metrics | {:.0f} % |", "time_shares", "shares/metrics", PERCENT),
    ("performance.md", "| 2 | 6,750 | {:.2f} (0.96 to 1.69)", "fronts", "fronts/2/ratio", 1),
    ("performance.md", "| 0 | 5,005 | 1 | {:.0f} µs", "fronts", "fronts/0/dispatcher_cpu_s", 1e6),
    ("performance.md", "| {:.0f} µs | 124 µs |", "fronts", "fronts/2/dispatcher_cpu_s", 1e6),
    ("performance.md", "| {:.0f} | 1 |", "baselines", "systems/cascade/rows_per_s", 1),
    ("performance.md", "| {:.2f} (0.90 to 1.14) |", "baselines", "static/ratio", 1),
    ("performance.md", "| {:.2f} (0.80 to 0.90) |", "baselines", "bls/ratio", 1),
    ("performance.md", "| {:.0f} | 0.10 (one search) |", "baselines", "ray/rows_per_s", 1),
    ("explanation/faults.md", "| {} changes of instance groups", "endurance", "changes/group_changes", 1),
    ("explanation/faults.md", "and {} loads and unloads", "endurance", "changes/model_moves", 1),
    ("explanation/faults.md", "p99 {:.1f} ms meanwhile", "endurance", "changes/changing/p99_s", MS),
    ("explanation/faults.md", "meanwhile, {:.1f} ms without", "endurance", "changes/steady/p99_s", MS),
    ("explanation/faults.md", "by a surge | p99 {:.1f} ms |", "endurance", "layouts/p99_s", MS),
    ("explanation/faults.md", "a Python process, {:.2f} s,", "endurance", "faults/back_s/killed", 1),
    ("explanation/faults.md", "sent to again | p99 {:.1f} ms |", "endurance", "faults/p99_s", MS),
    ("explanation/faults.md", "ready again within {:.2f} s", "endurance", "restarts/ready_s", 1),
    ("explanation/faults.md", "ready within {:.2f} s, all", "endurance", "transitions/ready_s", 1),
]


@pytest.mark.parametrize(("page", "words", "result", "place", "scale"), QUOTED, ids=[f"{q[2]} {q[3]}" for q in QUOTED])
def test_figures_are_those_of_the_committed_results(
    page: str, words: str, result: str, place: str, scale: float
) -> None:
    value = json.loads((RESULTS / f"{result}.json").read_text())
    for step in place.split("/"):
        value = value[int(step)] if isinstance(value, list) else value[step]
    assert words.format(value * scale) in " ".join((ROOT / "docs" / page).read_text().split())
