import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from mla_moe.config import ConfigError, DataConfig, Recipe, TrainingConfig
from mla_moe.report.drawing import BLUE, GREEN, VIOLET
from mla_moe.report.page import write_report
from mla_moe.training.metrics import MetricsWriter

ATTACK = '\n    <script>alert("x")</script> & </pre>'


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run with everything a run can leave behind."""
    run_dir = tmp_path_factory.mktemp("runs") / "quick & <b>start"
    with MetricsWriter(run_dir, None, "pretrain") as writer:
        for step in range(2, 42, 2):
            writer.write(
                step,
                {
                    "loss": math.nan if step == 20 else 5.0 / step,
                    "lr": 1e-3,
                    "grad_norm": 0.5,
                    "tokens_per_s": 1000.0 + step,
                    "moe/load_max": 1.5,
                    "moe/dropped": 0,
                    "step_seconds": 3.0,
                    "skipped": float(step == 20),
                },
            )
            writer.write_load(step, np.arange(1, 25).reshape(3, 8) + step)
        for step, bits in ((20, 3.0), (40, 1.5)):
            writer.write(step, {"eval/bits_per_byte": bits, "eval/gzip_bits_per_byte": 2.0, "eval/loss": bits / 2})
        writer.append_samples([{"step": 40, "prompt": "def f(", "completion": ATTACK}] * 40)
    recipe = Recipe(run_dir="x</pre><script>", training=TrainingConfig(batch_size=4, sequence_length=100, log_every=2))
    (run_dir / "recipe.json").write_text(recipe.to_json())
    (run_dir / "summary.json").write_text(json.dumps({"Parameters <all>": "1.2 M & more"}))
    return write_report(run_dir).read_text()


def bare(run_dir, metrics, stage="pretrain"):
    """The page of a run that left nothing but one row of metrics."""
    with MetricsWriter(run_dir, None, stage) as writer:
        writer.write(1, metrics)
    return write_report(run_dir).read_text()


def captions(page):
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def headlines(page):
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", page)
    return {name: (figure, note) for name, figure, note in found}


def test_the_page_is_self_contained(full):
    references = re.findall(r"""(?:src|href|url)\s*(?:=\s*["']?|\(\s*["']?)([^"')\s>]+)""", full)
    assert references
    assert [r for r in references if not r.startswith(("#", "data:"))] == []
    assert "@import" not in full
    names_of_formats = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"""https?://[^\s"'<>]+""", full)) == names_of_formats


def test_nothing_a_run_wrote_becomes_markup(full):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed(full)
    assert tags.count("h1") == 1
    assert not {"script", "b", "all"} & set(tags)
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt; &amp; &lt;/pre&gt;" in full
    assert "<title>quick &amp; &lt;b&gt;start</title>" in full


def test_a_browser_shows_a_samples_first_newline(full):
    assert "<pre>\n\n    &lt;script" in full


def test_every_section_is_there(full):
    assert captions(full) == [
        "Loss",
        "Held-out bits per byte",
        "Learning rate",
        "Tokens per second",
        "Gradient norm",
        "Max load ratio (max / mean tokens per expert)",
        "Expert load",
        "Layer 1",
        "Layer 2",
        "MTP module",
    ]
    assert "<th>Parameters &lt;all&gt;</th><td>1.2 M &amp; more</td>" in full
    assert "The last 32 of 40." in full
    assert "held-out</text>" in full
    assert full.count("<td>pretrain 40</td>") == 32
    assert "&quot;sequence_length&quot;: 100" in full


def test_headlines(full):
    assert headlines(full) == {
        "Final loss": ("0.125", "mean of the last tenth 0.128"),
        "Bits per byte": ("1.500", "held-out text; beats gzip -9 by 25.0% (2.000)"),
        "Tokens per second": ("1.02 k", "median"),
        "Tokens": ("16.0 k", "in 40 steps"),
        "Wall time": ("2:00", "in training steps"),
        "Max load ratio": ("1.50&times;", "most loaded expert over the mean, in the last tenth"),
        "Skipped steps": ("1", "updates not applied"),
        "Not finite": ("1", "metrics that were NaN or infinite"),
    }


def test_losing_to_gzip_is_shown(tmp_path):
    page = bare(tmp_path / "run", {"eval/bits_per_byte": 2.5, "eval/gzip_bits_per_byte": 2.0})
    assert headlines(page) == {"Bits per byte": ("2.500", "held-out text; does not beat gzip -9 (2.000)")}


def test_with_several_sources_losses_of_the_same_text_share_an_axis(tmp_path):
    """The loss of the mixture (of code and easy arithmetic) is not drawn with the held-out loss (of code)."""
    data = DataConfig(train=("code.txt", "a/long/path/to/the/arithmetic.txt"), heldout=("heldout.txt",))
    with MetricsWriter(tmp_path, None, "pretrain") as writer:
        for step in (1, 2):
            evaluated = {"eval/loss/code.txt": 4.4, f"eval/loss/{data.train[1]}": 0.5, "eval/loss/heldout.txt": 4.6}
            writer.write(step, {"loss": 0.86, "eval/loss": 4.6, **evaluated})
    (tmp_path / "recipe.json").write_text(Recipe(run_dir="", data=data).to_json())
    page = bare(tmp_path, {"loss": 0.1}, stage="rl")
    assert captions(page) == ["Training loss of the mixture of sources", "Loss of each source, evaluated", "Loss"]
    labels = re.findall(r">([^<>]*\.txt)</text>", page)
    assert labels == ["train: code.txt", "train: …ong/path/to/the/arithmetic.txt", "held-out: heldout.txt"]
    assert source_colors(page) == [BLUE, GREEN, VIOLET]  # heldout.txt may be like neither


def source_colors(page):
    panel = page.partition("Loss of each")[2].partition("<h2>")[0]
    return re.findall(r"stroke: (#[0-9a-f]{6})[^>]*/>\s*<defs", panel)


SOURCES = {  # data.train and data.heldout: title of the training loss, legend, colors
    "by name": (
        ("cpython:train", "b.txt"), ("cpython:heldout", "b.txt", "c.txt"), "Training loss of the mixture of sources",
        ["train: cpython:train", "held-out: cpython:heldout", "held-out: b.txt", "held-out: c.txt"],
        [BLUE, BLUE, GREEN, VIOLET],
    ),
    "by position": (
        ("_a", "b"), ("c", "d"), "Training loss of the mixture of sources",
        ["train: _a", "train: b", "held-out: c", "held-out: d"], [BLUE, GREEN, BLUE, GREEN],
    ),
    "one training source": (
        ("a",), ("c", "d"), "Training loss", ["train: a", "held-out: c", "held-out: d"], [BLUE, GREEN, VIOLET],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("train", "heldout", "title", "labels", "colors"), SOURCES.values(), ids=SOURCES)
def test_a_held_out_source_has_the_color_of_its_training_source(tmp_path, train, heldout, title, labels, colors):
    (tmp_path / "recipe.json").write_text(Recipe(run_dir="", data=DataConfig(train=train, heldout=heldout)).to_json())
    page = bare(tmp_path, {"loss": 1.0, **{f"eval/loss/{name}": 2.0 for name in train + heldout}})
    assert captions(page) == [title, "Loss of each source, evaluated"]
    assert re.findall(r">((?:train|held-out): [^<>]*)</text>", page) == labels
    assert source_colors(page) == colors


def test_held_out_loss_without_that_of_each_source_has_its_own_panel(tmp_path):
    data = DataConfig(train=("a", "b"), heldout=("c",))
    (tmp_path / "recipe.json").write_text(Recipe(run_dir="", data=data).to_json())
    page = bare(tmp_path, {"loss": 1.0, "eval/loss": 2.0})
    assert captions(page) == ["Training loss of the mixture of sources", "Held-out loss"]


def test_what_a_run_does_not_have_is_left_out(tmp_path):
    page = bare(tmp_path / "run", {"loss": 2.0})
    assert captions(page) == ["Loss"]
    assert list(headlines(page)) == ["Final loss"]
    for absent in ("<table", "<details", "Samples", "held-out"):
        assert absent not in page


def test_a_metric_that_was_never_finite_has_no_curve(tmp_path):
    page = bare(tmp_path / "run", {"loss": math.nan, "grad_norm": 1.0})
    assert captions(page) == ["Gradient norm"]
    assert list(headlines(page)) == ["Not finite"]


def test_each_stage_has_its_section(tmp_path):
    bare(tmp_path / "run", {"loss": 2.0})
    page = bare(tmp_path / "run", {"grad_norm": 2.0}, stage="rl")
    assert re.findall("<h2>(.*?)</h2>", page) == ["Pretraining", "Reinforcement learning"]
    assert captions(page) == ["Loss", "Gradient norm"]


def test_many_layers_and_one_row_of_loads(tmp_path):
    with MetricsWriter(tmp_path, None, "pretrain") as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_load(1, np.ones((58, 4)))
    names = captions(write_report(tmp_path).read_text())
    assert names[1:] == ["Expert load", *(f"Layer {i}" for i in (0, 8, 16, 24, 33, 41, 49, 57))]


def test_no_run_is_an_error_that_names_the_field(tmp_path):
    with pytest.raises(ConfigError, match=r"^run_dir = .*no such directory"):
        write_report(tmp_path / "absent")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"^run_dir = .*no metrics\.jsonl"):
        write_report(tmp_path)


def test_a_broken_file_is_named(tmp_path):
    with MetricsWriter(tmp_path, None, "pretrain") as writer:
        writer.write(1, {"loss": 1.0})
    (tmp_path / "summary.json").write_text('{"cut')
    with pytest.raises(ConfigError, match=r"summary.json': is not JSON"):
        write_report(tmp_path)


def test_only_the_finished_page_is_left(tmp_path):
    bare(tmp_path, {"loss": 1.0})
    assert [path.name for path in tmp_path.glob("report*")] == ["report.html"]
