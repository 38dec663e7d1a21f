"""The README and the docs: their Python code runs, their links resolve, their pictures match the code."""

import os
import re
import runpy
import subprocess
import sys

import pytest

import mla_moe
from mla_moe.config import PRESETS
from mla_moe.config.architectures import ARCHITECTURES
from tests.docs.conftest import PAGES, ROOT, blocks
from tests.test_layers import LAYERS

PYTHON = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


@pytest.mark.smoke
def test_modules_in_the_readme_work_alone():
    names = {}
    exec(next(text for language, text in blocks(PAGES[0]) if language == "python"), names)
    assert names["rows"].shape == names["y"].shape == names["gradient"].shape


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
@pytest.mark.slow
def test_python_code_runs(page, world, monkeypatch):
    """All blocks of a page, in order, in one namespace."""
    monkeypatch.chdir(world)
    names = {}
    for language, text in blocks(page):
        if language == "python":
            exec(text, names)


def test_code_blocks_are_commands_python_or_text():
    assert {language for page in PAGES for language, _ in blocks(page)} == {"", "python", "text"}


def test_first_two_commands_of_the_readme_are_single_lines():
    (_, first), (_, second) = blocks(PAGES[0])[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert first.endswith("train.py configs/quickstart.py\n")
    assert second.endswith("-m pytest\n")


def test_links_resolve():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_tests_that_are_named_exist():
    wrong = []
    for page in PAGES:
        for path, name in re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text("utf-8")):
            file = ROOT / path
            if not file.is_file() or (name and f"\ndef {name}(" not in file.read_text("utf-8")):
                wrong.append(f"{page.name}: {path}::{name}")
    assert not wrong


def test_each_line_of_the_threat_model_names_what_holds_it():
    text = (ROOT / "docs" / "threat-model.md").read_text("utf-8")
    tables = re.findall(r"^\|.*\| test \|\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 20
    assert not [row for row in rows if not re.search(r" `(tests|benchmarks)/\S+` \|$", row)]


def test_every_page_and_example_is_linked():
    pages = {page: page.read_text("utf-8") for page in PAGES}
    index = pages[ROOT / "docs" / "README.md"]
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs')})" in index
    for example in (ROOT / "examples").glob("*.py"):
        assert any(f"examples/{example.name}" in text for text in pages.values())


def test_the_reference_lists_exactly_the_public_names():
    text = (ROOT / "docs" / "api" / "mla_moe.md").read_text("utf-8")
    listed = re.findall(r"^        - (\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(mla_moe.__all__), "docs/api/mla_moe.md lists mla_moe.__all__"
    assert mla_moe.__all__ == sorted(set(mla_moe.__all__))
    for name in mla_moe.__all__:
        assert getattr(mla_moe, name).__doc__


IMPORTERS = [ROOT / "docs" / f"{name}.md" for name in ("modules", "importing")]
IMPORTERS += [
    ROOT / "examples" / f"{name}.py"
    for name in ("own_loop", "cached_decoding", "custom_router", "linen_moe", "explicit_mesh")
]
"""What shows how other code uses the package."""


@pytest.mark.parametrize("path", IMPORTERS, ids=lambda path: path.name)
def test_examples_for_importers_use_public_names_alone(path):
    text = path.read_text("utf-8")
    assert not re.findall(r"^from mla_moe\.\S+|^import mla_moe\.\S+", text, re.MULTILINE)
    used = set(re.findall(r"\bmla_moe\.([A-Za-z_]\w*)", text)) - {"md"}
    assert used <= set(mla_moe.__all__)


@pytest.mark.slow
def test_site_builds_and_its_links_resolve(tmp_path):
    """MkDocs with the API reference; `--strict` makes each warning an error."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "mkdocs.yml"), "-d", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "index.html").is_file()
    assert (site / "api" / "nn.html").is_file()
    broken = []
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text("utf-8")):
            target = site / link[1:] if link.startswith("/") else page.parent / link
            if not re.match(r"[a-z]+:", link) and not os.path.exists(os.path.normpath(target)):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken


def test_table_of_architectures_names_each_with_its_presets():
    hook = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]
    table = hook((ROOT / "docs" / "architectures.md").read_text("utf-8"))
    for name in (*ARCHITECTURES, *PRESETS):
        assert table.count(f"`{name}`") == 1


def test_pictures_match_the_code():
    for name, draw in runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))["PICTURES"].items():
        drawn = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text("utf-8")
        assert drawn == draw(), "python docs/pictures/draw.py"


def test_diagram_of_packages_matches_the_layers():
    diagram = next(text for language, text in blocks(ROOT / "CONTRIBUTING.md") if language == "text")
    layers = [tuple(re.split(r"  +", line)[0].split()) for line in diagram.splitlines()]
    assert layers[::-1] == LAYERS
