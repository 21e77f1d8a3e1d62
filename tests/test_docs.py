"""The documentation builds, every link in it leads somewhere, and its generated pages say what the code says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascadeserve.cli import _COMMANDS

ROOT = Path(__file__).parent.parent


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
