"""The commands of `mla-moe`, called with arguments as on the command line."""

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
from flax import nnx

import mla_moe
from mla_moe.checkpoint import safetensors_writer
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.safetensors_reader import SafetensorsReader
from mla_moe.cli import main
from mla_moe.cli.eval import Eval
from mla_moe.config import Recipe, RLConfig, TaskConfig
from mla_moe.rl.evaluate import evaluate
from mla_moe.rl.rewards import Reward
from mla_moe.rl.rollout import Rollout
from mla_moe.rl.tasks import open_task
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = json.loads((Path(__file__).parents[1] / "config" / "released.json").read_text())
"""The `config.json` of models, as they are released, and their published total and active parameters."""

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


@pytest.mark.parametrize("name", RELEASED)
def test_inspect_of_a_released_config_json_prints_the_published_parameters(name, capsys, caplog, tmp_path):
    """It is the preset, and no field is ignored. Active ones are published with or without the embedding, a lookup, and
    indexers; of LongCat-Flash as the mean."""
    config, (total, active) = RELEASED[name]["config"], RELEASED[name]["published"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found, used = (int(re.search(rf"{row} +([\d,]+)", out)[1].replace(",", "")) for row in ("parameters", "per token"))
    assert found == pytest.approx(total, rel=0.03)
    cfg = mla_moe.ModelConfig.from_hf(tmp_path)
    assert cfg == mla_moe.preset(name)
    lookup = cfg.vocab_size * cfg.hidden_size
    H, width, Q = cfg.index_n_heads, cfg.index_head_dim, cfg.q_lora_rank
    indexers = (
        0
        if cfg.index_topk is None
        else cfg.shared_indexers.count(False) * (Q * H * width + cfg.hidden_size * (H + width) + 2 * width)
    )
    assert any(n == pytest.approx(active, rel=0.025) for n in (used, used - lookup, used - lookup - indexers))
    assert not caplog.records


def test_inspect_reads_a_checkpoint_and_its_config_file(capsys, tmp_path):
    outs = []
    for path in (GOLDEN / "v3", GOLDEN / "v3" / "config.json"):
        assert main(["inspect", str(path)]) == 0
        outs.append(capsys.readouterr().out.split("\n", 1)[1])
    assert outs[0].split() == outs[1].split()


def test_nothing_is_left_of_a_conversion_that_sigterm_ends(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    write_file = safetensors_writer.write_file

    def write_and_end(*args):
        write_file(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(safetensors_writer, "write_file", write_and_end)
    try:
        with pytest.raises(SystemExit, match="143"):
            main(["convert", str(GOLDEN / "v3"), str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_convert_round_trip(capsys, tmp_path):
    assert main(["convert", str(GOLDEN / "v3"), str(tmp_path / "orbax"), "--to", "orbax"]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "hf")]) == 0
    before, after = SafetensorsReader(GOLDEN / "v3"), SafetensorsReader(tmp_path / "hf")
    assert {name: before[name].tobytes() for name in before.stored} == {n: after[n].tobytes() for n in after.stored}
    assert (
        main(["convert", str(tmp_path / "hf"), str(tmp_path / "wide"), "--dtype", "float32", "--quantize", "fp8"]) == 0
    )
    assert re.search(r"wide: \d.* MB", capsys.readouterr().out)


def test_errors_are_one_line(capsys, tmp_path):
    for arguments in (
        ["convert", str(tmp_path / "nothing"), str(tmp_path / "out")],
        ["convert", str(GOLDEN / "v3"), str(tmp_path)],
        ["convert", str(GOLDEN / "v3"), str(tmp_path / "out"), "--to", "orbax", "--quantize", "fp8"],
        ["convert", str(GOLDEN / "v3"), str(tmp_path / "out"), "--fp8"],
        ["inspect", "gpt-2"],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["convert", "ftp://b/x", "out"], "checkpoint"),
        (["convert", str(GOLDEN / "v3"), "ftp://b/x"], "path"),
        (["convert", str(GOLDEN / "v3"), "ftp://b/x", "--to", "orbax"], "path"),
        (["generate", "ftp://b/x", "--prompt", "a"], "checkpoint"),
        (["serve", "ftp://b/x"], "checkpoint"),
        (["eval", "ftp://b/x", "--task", "arithmetic"], "checkpoint"),
        (["inspect", "ftp://b/x"], "model"),
        (["plan", "ftp://b/x", "--topology", "cpu"], "recipe"),
        (["report", "ftp://b/x"], "run_dir"),
        (["train", "ftp://b/x"], "recipe"),
    ],
)
def test_a_url_is_refused_by_name(arguments, field, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {field} = 'ftp://b/x': is a URL; only files of this host")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def untrained(cfg, tmp_path_factory):
    """A randomly initialised model without a tokenizer."""
    path = tmp_path_factory.mktemp("untrained") / "model"
    small = dataclasses.replace(cfg, vocab_size=258, num_nextn_predict_layers=0)
    mla_moe.save_pretrained(mla_moe.Transformer(small, rngs=nnx.Rngs(0)), path)
    return path


LIMITS = ("--split", "validation", "--prompts", "6", "--samples", "2", "--seed", "3", "--max-num-seqs", "8")


def test_eval_prints_the_metrics_of_evaluate(untrained, capsys):
    settings = TaskConfig(template="{question}=", options=("least=2", "most=2"), answer_format="auto")
    task = open_task(settings)
    rl = RLConfig(max_prompt_tokens=16, max_new_tokens=8, max_num_seqs=8, routing_replay=False)
    with Reward(settings, task) as reward:
        rollout = Rollout(rl, settings.template, task, reward, load_chat_tokenizer(untrained, ByteTokenizer()))
        rollout.load_weights(mla_moe.load_pretrained(untrained))
        result = evaluate(rollout, "validation", 6, 2, 3)
    expected = result.metrics() | {"answer_format": "auto", "found_by": result.found_by()}

    flags = ("--options", "least=2", "most=2", "--template", "{question}=")
    flags += ("--max-prompt-tokens", "16", "--max-new-tokens", "8")
    assert main(["eval", str(untrained), "--task", "arithmetic", *flags, *LIMITS, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    settings = {"task": "arithmetic", "options": ["least=2", "most=2"], "split": "validation", "prompts": 6}
    assert printed == settings | expected | {"prompts_too_long": 0}
    assert {"eval/accuracy", "eval/pass@2", "eval/majority@2", "eval/response_length"} < expected.keys()


def test_eval_takes_task_template_and_limits_from_the_run(untrained, tmp_path, capsys):
    """But not the reward function, which would be imported."""
    step = tmp_path / "checkpoints" / "rl" / "1"
    step.parent.mkdir(parents=True)
    convert(untrained, step, to="orbax")
    task = TaskConfig(
        template="{question}?", options=("least=1", "most=1"), reward_functions=("no.such.module:reward",)
    )
    recipe = Recipe(run_dir="", task=task, rl=RLConfig(max_prompt_tokens=12, max_new_tokens=6))
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert Eval(untrained, adapter=tmp_path)._settings() == Eval(tmp_path)._settings()
    assert main(["eval", str(tmp_path), *LIMITS]) == 0
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["held-out", "prompts"],
        ["task", "arithmetic"],
        ["validation", "prompts"],
        ["answer", "format"],
        ["correct", "(greedy)"],
        ["prefilled", "with"],
        ["correct", "format"],
        ["tokens", "per"],
        ["correct", "(sampled,"],
        ["correct", "format"],
        ["tokens", "per"],
        ["correct", "in"],
        ["correct", "majority"],
    ]


def test_eval_uses_every_line_of_a_test_file_and_fits_the_model(untrained, tmp_path, capsys):
    """Without a flag for the split or for lengths."""
    pytest.importorskip("math_verify", reason="pip install 'mla_moe[rl]'")
    file = tmp_path / "test.jsonl"
    file.write_text("".join(f'{{"question": "{i}", "answer": "{i}"}}\n' for i in range(7)))
    flags = ("--template", "{question}", "--samples", "0", "--max-num-seqs", "8", "--max-new-tokens", "5")
    assert main(["eval", str(untrained), "--task", str(file), *flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["split"], printed["prompts"], printed["answer_format"]) == ("all", 7, "auto")
    assert sum(printed["found_by"].values()) == 7


def test_eval_counts_prompts_that_are_too_long(untrained, capsys):
    limits = ("--max-prompt-tokens", "13", "--max-new-tokens", "4")
    task = ("--task", "arithmetic", "--template", "{question}")
    assert main(["eval", str(untrained), *task, *limits, *LIMITS, "--samples", "0"]) == 0
    out = capsys.readouterr().out
    assert "prompts too long" in out
    assert "sampled" not in out


def test_invalid_eval_flags_are_one_line(untrained, capsys):
    for arguments, field in (
        (["--prompts", "2"], "task"),
        (["--task", "arithmetik"], "task.name"),
        (["--task", "arithmetic", "--max-new-tokens", "100000"], "max_new_tokens"),
        (["--task", "arithmetic", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--task", "arithmetic", "--max-prompt-tokens", "-3"], "max_prompt_tokens"),
        (["--task", "arithmetic", "--max-prompt-tokens", "100", "--max-new-tokens", "100"], "max_new_tokens"),
        (["--task", "arithmetic", "--split", "all"], "split"),
        (["--task", "arithmetic", "--answer-format", "tags"], "task.answer_format"),
        (["--task", "arithmetic", "--prompts", "0"], "prompts"),
        (["--task", "arithmetic", "--temperature", "0"], "rl.temperature"),
    ):
        assert main(["eval", str(untrained), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {field} = ")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "old", "new"),
    [
        (["eval", "runs/x", "--slots", "8"], "--slots", "--max-num-seqs"),
        (["serve", "runs/x", "--capacity=4096"], "--capacity", "--max-model-len"),
        (["generate", "runs/x", "--prompt", "a", "--int8_cache"], "--int8-cache", "--int8-kv-cache"),
    ],
)
def test_a_renamed_flag_is_one_line_with_the_new_name(arguments, old, new, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{old}: renamed; use {new}\n"


@pytest.mark.parametrize("value", ["-x", "-x y", "- item", "--chat it", "---", "-1", "-é"])
def test_a_value_may_begin_with_a_dash(value, capsys, tmp_path):
    """The prompt is taken, so that the error is about the checkpoint."""
    assert main(["generate", str(tmp_path / "none"), "--prompt", value, "--stop", value]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint = ")
