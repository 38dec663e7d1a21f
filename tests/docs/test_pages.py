"""The README and the docs: their Python runs, their links lead somewhere, their pictures are those of the code."""

import os
import re
import runpy

import pytest

from tests.docs.conftest import PAGES, ROOT, blocks
from tests.test_house import FLOORS

PYTHON = [page for page in PAGES if any(language == "python" for language, _ in blocks(page))]


@pytest.mark.smoke
def test_the_readmes_modules_work_alone():
    names = {}
    exec(next(text for language, text in blocks(PAGES[0]) if language == "python"), names)
    assert names["rows"].shape == names["y"].shape == names["gradient"].shape


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_runs(page, world, monkeypatch):
    """The blocks of a page, one after the other."""
    monkeypatch.chdir(world)
    names = {}
    for language, text in blocks(page):
        if language == "python":
            exec(text, names)


def test_blocks_are_commands_python_or_text():
    assert {language for page in PAGES for language, _ in blocks(page)} == {"", "python", "text"}


def test_the_first_two_commands_are_single_lines():
    (_, first), (_, second) = blocks(PAGES[0])[:2]
    assert first.count("\n") == second.count("\n") == 1
    assert first.endswith("train.py configs/quickstart.py\n")
    assert second.endswith("-m pytest\n")


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.name}: {link}")
    assert not broken


def test_every_page_and_example_can_be_found():
    pages = {page: page.read_text("utf-8") for page in PAGES}
    index = pages[ROOT / "docs" / "README.md"]
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs')})" in index
    for example in (ROOT / "examples").glob("*.py"):
        assert any(f"examples/{example.name}" in text for text in pages.values())


def test_the_site_is_whole(tmp_path):
    """Every link of every rendered page; those that leave it lead into the repository, beside which it lies."""
    site = tmp_path / "site"
    runpy.run_path(str(ROOT / "docs" / "render.py"))["main"](site)
    assert (site / "index.html").is_file()
    broken = []
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#]+)', page.read_text("utf-8")):
            inside = os.path.normpath(page.parent / link)
            outside = os.path.normpath(ROOT / "docs" / page.parent.relative_to(site) / link)
            if "://" not in link and not os.path.exists(inside) and not os.path.exists(outside):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert not broken


def test_pictures_are_what_the_code_draws():
    for name, draw in runpy.run_path(str(ROOT / "docs" / "pictures" / "draw.py"))["PICTURES"].items():
        drawn = (ROOT / "docs" / "pictures" / f"{name}.svg").read_text("utf-8")
        assert drawn == draw(), "python docs/pictures/draw.py"


def test_the_house_is_drawn_as_it_is():
    drawing = next(text for language, text in blocks(ROOT / "CONTRIBUTING.md") if language == "text")
    drawn = [tuple(re.split(r"  +", line)[0].split()) for line in drawing.splitlines()]
    assert drawn[::-1] == FLOORS
