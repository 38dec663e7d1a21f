"""The README's Python runs, and its commands are the ones that are tested."""

import re

import pytest

from mla_moe.cli import main


@pytest.fixture(scope="module")
def readme(request):
    return (request.config.rootpath / "README.md").read_text()


@pytest.mark.smoke
def test_python_blocks_run(readme):
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)  # `python notest` names files of the reader's
    assert blocks
    for block in blocks:
        names = {}
        exec(block, names)
        assert names["rows"].shape == names["y"].shape == names["gradient"].shape


def test_the_first_two_commands_are_single_lines(readme):
    first, second = re.findall(r"```\n(.*?)\n```", readme, re.S)[:2]
    assert "\n" not in first + second
    assert first.endswith("train.py configs/quickstart.py")
    assert second.endswith("-m pytest")


def test_inspect_prints_the_published_numbers(capsys):
    assert main(["inspect", "deepseek-v3"]) == 0
    out = capsys.readouterr().out
    assert "671,026,419,200" in out
    assert "70,272" in out


def test_errors_end_with_code_2(capsys, tmp_path):
    assert main(["inspect", "gpt-2"]) == 2
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("error:") == 2
