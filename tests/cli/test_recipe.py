"""Recipes that take the model from a checkpoint, and the preview of their data."""

import dataclasses
import json

import pytest
from flax import nnx

import mla_moe
from mla_moe import ConfigError
from mla_moe.cli import main
from mla_moe.cli.recipe import open_recipe, split_recipe
from mla_moe.text.tokenizer import train_bpe

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def checkpoint(cfg, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "model"
    model = dataclasses.replace(cfg, vocab_size=280, num_nextn_predict_layers=0)
    mla_moe.save_pretrained(mla_moe.Transformer(model, rngs=nnx.Rngs(0)), path)
    train_bpe(["hello there, how are you? " * 4], 270, path / "tokenizer.json")
    (path / "chat_template.jinja").write_text(TEMPLATE + "{% if add_generation_prompt %}<assistant>{% endif %}")
    return path


@pytest.mark.parametrize("name", ["sft", "dpo", "rl"])
def test_model_and_tokenizer_are_those_of_the_checkpoint(checkpoint, cfg, name):
    path, flags = split_recipe(["--init-from", str(checkpoint), f"configs/{name}.py", "--model.rope-theta", "5000"])
    recipe = open_recipe(path, flags, "train")
    model = dataclasses.replace(cfg, vocab_size=280, num_nextn_predict_layers=0, rope_theta=5000.0)
    assert (recipe.model, recipe.data.tokenizer) == (model, str(checkpoint / "tokenizer.json"))
    assert (recipe.model_from, recipe.init_from) == ("recipe", str(checkpoint)), "recipe.json needs no checkpoint"
    with pytest.raises(ConfigError, match=r"^init_from = None: .*--init-from DIR"):
        open_recipe(path, [], "train")
    assert split_recipe(["--a=b", "x.py", "--c", "d"]) == ("x.py", ["--a=b", "--c", "d"])
    assert split_recipe(["--help"]) == ("", ["--help"])


def test_a_sequence_length_of_the_recipe_is_limited_and_logged_unless_a_flag_replaces_it(checkpoint, cfg, caplog):
    flags = ["--init-from", str(checkpoint)]
    assert open_recipe("configs/sft.py", flags, "train").sft.sequence_length == cfg.max_position_embeddings
    assert "sft.sequence_length = 4096 is more than the model has positions" in caplog.text
    caplog.clear()
    assert open_recipe("configs/sft.py", [*flags, "--sft.sequence-length", "64"], "train").sft.sequence_length == 64
    assert not caplog.records


def test_prompts_and_completions_of_rl_fit_the_model_unless_flags_set_them(checkpoint, caplog):
    flags = ["--init-from", str(checkpoint)]
    rl = open_recipe("configs/rl.py", flags, "train").rl
    assert (rl.max_prompt_tokens, rl.max_new_tokens) == (32, 96)
    assert "4096 is more than the model has positions; 32 + 96 instead" in caplog.text
    with pytest.raises(ConfigError, match=r"196: must be at most model\.max_position_embeddings = 128"):
        open_recipe("configs/rl.py", [*flags, "--rl.max-prompt-tokens", "100"], "train")
    caplog.clear()
    rl = open_recipe("configs/rl.py", [*flags, "--rl.max-new-tokens", "64"], "train").rl
    assert (rl.max_prompt_tokens, rl.max_new_tokens) == (32, 64)
    assert "32 + 96 instead, where no flag gives them" in caplog.text, "prompts are limited without a flag"
    caplog.clear()
    open_recipe("configs/rl.py", [*flags, "--rl.max-prompt-tokens", "60", "--rl.max-new-tokens", "64"], "train")
    assert not caplog.records


def test_preview_shows_tokens_and_where_the_loss_is(checkpoint, tmp_path, capsys):
    messages = [{"role": "user", "content": "hel\x1blo"}, {"role": "assistant", "content": "you"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    rejected = [messages[0], {"role": "assistant", "content": "there"}]
    (tmp_path / "b.jsonl").write_text(json.dumps({"chosen": messages, "rejected": rejected}))
    flags = "--init-from", str(checkpoint), "--run-dir", str(tmp_path / "run")
    assert main(["data", "preview", "configs/sft.py", *flags, "--sft.data", str(tmp_path / "a.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "1 examples, of 1 records of the format messages" in out
    assert out.replace("│", "").endswith("<user>hel\\x1blo<assistant>«you</s>»\n")
    assert main(["data", "preview", "configs/dpo.py", *flags, "--dpo.data", str(tmp_path / "b.jsonl")]) == 0
    out = capsys.readouterr().out.replace("│", "")
    assert "example 1, chosen: " in out
    assert out.endswith("<user>hel\\x1blo<assistant>«there</s>»\n")
