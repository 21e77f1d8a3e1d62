"""The documentation builds, every link in it leads somewhere, and its generated pages say what the code says."""

from __future__ import annotations

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
