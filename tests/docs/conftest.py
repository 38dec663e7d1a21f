"""A directory with the files that documented commands name, all of them tiny."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from flax import nnx

import mla_moe
from mla_moe.checkpoint.convert import convert
from mla_moe.config import MeshConfig, Recipe
from mla_moe.text.tokenizer import train_bpe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = PAGES[0].read_text("utf-8")
VOCABULARY = 300
QUESTIONS = [{"question": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(60)]


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced code blocks of a page, each with its language."""
    return re.findall(r"^```(.*)\n((?:.*\n)*?)```$", page.read_text("utf-8"), re.MULTILINE)


def small(recipe: Recipe) -> Recipe:
    """The same recipe with a tiny model and few steps of few tokens, on the present devices."""
    change = dataclasses.replace
    rl = recipe.rl
    lengths = {
        "max_prompt_tokens": min(4 * rl.max_prompt_tokens, 448),
        "max_new_tokens": 8,
        "packed_length": 0,
        "overlong_buffer": 0,
    }
    sizes = {"prompts_per_step": 2, "group_size": 4, "minibatches": 1, "max_resample_rounds": 1}
    batches = {"batch_size": 8, "sequence_length": 64, "gradient_accumulation_steps": 1}
    microbatch = {"micro_batch_size": 8, "max_num_seqs": 8}
    evaluation = {"eval_prompts": 2, "eval_samples": 0, "eval_every": 0}
    builtin = {"cpython:train": "books/**/*.txt", "cpython:heldout": "books/**/*.txt"}
    tokenizer = recipe.data.tokenizer
    return change(
        recipe,
        model=model(),
        mesh=MeshConfig(),
        data=change(
            recipe.data,
            train=tuple(builtin.get(name, name) for name in recipe.data.train),
            heldout=("books/**/*.txt",),
            tokenizer=f"bpe:{VOCABULARY}" if tokenizer.startswith("bpe:") else tokenizer,
            shuffle_buffer_size=4,
        ),
        training=change(
            recipe.training, steps=2 * min(recipe.training.steps, 1), **batches, remat="none", eval_every=0,
        ),
        sft=change(recipe.sft, steps=2 * min(recipe.sft.steps, 1), **batches),
        dpo=change(recipe.dpo, steps=2 * min(recipe.dpo.steps, 1), **batches),
        rl=change(rl, steps=min(rl.steps, 1), **lengths, **sizes, **microbatch, **evaluation),
        rejection=change(recipe.rejection, steps=min(recipe.rejection.steps, 1), prompts=2, samples=2),
        sample=change(recipe.sample, prompts=()),
    )  # fmt: skip


def model() -> mla_moe.ModelConfig:
    return mla_moe.ModelConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=32, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=32, max_position_embeddings=512,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The directory. A fake Hub has the same model, and texts."""
    fake_hub = pytest.importorskip("tests.hub.fake_hub")
    world = _world(tmp_path_factory)
    hub = fake_hub.FakeHub()
    files = {path.name: path.read_bytes() for path in (world / "path/to/DeepSeek-V2-Lite").iterdir()}
    hub.add("models/deepseek-ai/DeepSeek-V2-Lite", files)
    hub.add("datasets/org/texts", {"data/some.jsonl": (world / "valid/some.jsonl").read_bytes()})
    with pytest.MonkeyPatch.context() as monkeypatch, fake_hub.listening(hub, monkeypatch, world):
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
        yield world


def _world(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    for name in ("configs", "docs", "examples", "train.py", "pyproject.toml", "requirements.lock", ".ci", "tests"):
        (world / name).symlink_to(ROOT / name)
    for folder in ("books/old", "valid", "path/to", "runs"):
        (world / folder).mkdir(parents=True)
    for i in range(8):
        (world / f"books/old/{i}.txt").write_text(TEXT[i * 500 :])
    (world / "valid/some.jsonl").write_text(json.dumps({"text": TEXT[:1000]}) + "\n")
    _lines(world / "questions.jsonl", QUESTIONS)
    _lines(world / "pairs.jsonl", [{"question": q["question"], "completion": str(q["answer"])} for q in QUESTIONS])
    chats = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    _lines(world / "chats.jsonl", [{"messages": chats}] * 60)
    _lines(world / "preferences.jsonl", [{"prompt": "1 + 1 = ", "chosen": f"{i}", "rejected": "no"} for i in range(60)])
    for page in PAGES:
        for language, text in blocks(page):
            if language.startswith("python") and (name := re.match(r"# (\w+\.py)\n", text)):
                (world / name[1]).write_text(text)
    _checkpoint(world / "path/to/DeepSeek-V2-Lite")
    (world / "path/to/DeepSeek-V3").symlink_to(world / "path/to/DeepSeek-V2-Lite")
    (world / "path/to/tokenizer.json").symlink_to(world / "path/to/DeepSeek-V2-Lite/tokenizer.json")
    convert(world / "path/to/DeepSeek-V2-Lite", world / "path/to/orbax", to="orbax")
    (world / "runs/quickstart").mkdir()
    shutil.copy(world / "path/to/tokenizer.json", world / "runs/quickstart")
    return world


def _lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def _checkpoint(path: Path) -> None:
    """Write a Hugging Face directory with a chat template and an untrained model."""
    mla_moe.save_pretrained(mla_moe.Transformer(model(), rngs=nnx.Rngs(0)), path)
    train_bpe([TEXT], VOCABULARY, path / "tokenizer.json")
    names = json.loads((path / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": template}))
