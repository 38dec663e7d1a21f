"""`mla-moe` as it is typed."""

from pathlib import Path

import pytest

from mla_moe.cli import main
from mla_moe.interop.reader import Reader

GOLDEN = Path(__file__).parent / "golden"

# vocabulary; hidden / layers / heads; widths; dense layers; experts; groups; score; scaling; parameters
TABLE = {
    "deepseek-v2-lite": (
        "102400", "2048 / 27 / 16", "10944 / 1408", "64 / 2 / 6", "1 / 1", "softmax, no", "none",
        "YaRN 40 x 4096, mscale 0.707", "15,706,484,224",
    ),
    "deepseek-v2": (
        "102400", "5120 / 60 / 128", "12288 / 1536", "160 / 2 / 6", "8 / 3", "softmax, no", "16",
        "YaRN 40 x 4096, mscale 0.707", "235,741,434,880",
    ),
    "deepseek-v3": (
        "129280", "7168 / 61 / 128", "18432 / 2048", "256 / 1 / 8", "8 / 4", "sigmoid, yes", "2.5",
        "YaRN 40 x 4096, mscale 1", "671,026,419,200",
    ),
    "moonlight-16b-a3b": (
        "163840", "2048 / 27 / 16", "11264 / 1408", "64 / 2 / 6", "1 / 1", "sigmoid, yes", "2.446",
        "50000, no scaling", "15,960,110,208",
    ),
    "kimi-k2": (
        "163840", "7168 / 61 / 64", "18432 / 2048", "384 / 1 / 8", "1 / 1", "sigmoid, yes", "2.827",
        "YaRN 32 x 4096, mscale 1, beta 1/1", "1,026,408,232,448",
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", TABLE)
def test_inspect_prints_the_published_table(preset, capsys):
    assert main(["inspect", preset]) == 0
    out = capsys.readouterr().out
    for value in TABLE[preset]:
        assert value in out


def test_inspect_opens_checkpoints_and_their_config(capsys, tmp_path):
    outs = []
    for path in (GOLDEN / "v3", GOLDEN / "v3" / "config.json"):
        assert main(["inspect", str(path)]) == 0
        outs.append(capsys.readouterr().out.split("\n", 1)[1])
    assert outs[0].split() == outs[1].split()


def test_convert_there_and_back(capsys, tmp_path):
    assert main(["convert", str(GOLDEN / "v3"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "hf")]) == 0
    before, after = Reader(GOLDEN / "v3"), Reader(tmp_path / "hf")
    assert {name: before[name].tobytes() for name in before.stored} == {n: after[n].tobytes() for n in after.stored}
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "wide"), "--dtype", "float32", "--fp8"]) == 0
    assert "GB" in capsys.readouterr().out


def test_errors_are_one_line(capsys, tmp_path):
    for arguments in (
        ["convert", str(tmp_path / "nothing"), str(tmp_path / "out")],
        ["convert", str(GOLDEN / "v3"), str(tmp_path)],
        ["convert", str(GOLDEN / "v3"), str(tmp_path / "out"), "--to", "orbax", "--fp8"],
        ["inspect", "gpt-2"],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
