"""Write `runs.tar.xz`: one run of format version 1 at three moments, for `test_version_1.py`.

It is written with the code before `format_version` existed: in a checkout of commit 8a2d00a, with the dependencies of
that commit,

    PYTHONPATH=. python path/to/make.py path/to/runs.tar.xz

The run pretrains with MTP and Muon and then does RL with GRPO and a reference policy. `finished` ran without a stop;
`pretrain_half` and `rl_half` are a second run, stopped by a signal in each stage. `expected.json` has what the code of
version 1 printed for `finished`, and the environment in which the floats are reproduced bit for bit.
"""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

# As in tests/conftest.py: the numbers depend on both.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}

import jax
import numpy as np
import tensorstore as ts
from mla_moe.recipe import RL, Checkpoint, Data, Optimizer, Recipe, Sample, Schedule, Task, Training
from mla_moe.rl.stage import reinforce
from mla_moe.sharding import make_mesh
from mla_moe.training.run import Signals, open_run
from mla_moe.training.setup import Interrupted
from test_version_1 import environment

from mla_moe import ModelConfig
from mla_moe.cli import main as mla_moe_main
from mla_moe.report import write_report
from mla_moe.training import setup
from mla_moe.training.console import Console
from mla_moe.training.pretrain import pretrain

REWARD = '''
def short(prompt, completion, example):
    """Higher for fewer letters. Raises for some prompts, which is counted."""
    if example.question.startswith("3"):
        raise ValueError("no")
    return -len(completion) / 8
'''

RECIPE = Recipe(
    run_dir="",
    model=ModelConfig(
        vocab_size=258, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        moe_intermediate_size=4, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=8, q_lora_rank=8,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        max_position_embeddings=64, initializer_range=0.2, num_nextn_predict_layers=1,
    ),
    data=Data(train=("text/train-*.txt",), heldout=("text/heldout-*.txt",), shuffle_window=4, prefetch=2),
    optimizer=Optimizer("muon", Schedule(peak=5e-3, warmup=0.2, decay=0.5)),
    training=Training(
        steps=4, batch_size=8, sequence_length=32, accumulation=1, loss_chunk=16, skip_limit=5, spike=50.0
    ),
    task=Task(
        template="{question}=", options=("least=1", "most=2"), format=0.5, function="rewards.py:short",
        function_weight=2.0, timeout=20.0,
    ),
    rl=RL(
        steps=2, prompts=4, group_size=4, minibatches=2, max_prompt_tokens=16, max_new_tokens=8, kl=0.01,
        reference_every=1, rows=8, slots=8, eval_prompts=4, eval_samples=2,
        optimizer=Optimizer(schedule=Schedule(peak=1e-2, warmup=0.0, decay=0.5, final=0.4), weight_decay=0.0),
    ),
    checkpoint=Checkpoint(every=10, keep=1),
    sample=Sample(prompts=("ab",), max_new_tokens=4),
)  # fmt: skip


def write_inputs() -> None:
    """Documents of random words, and the reward function."""
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), random.integers(2, 7))) for _ in range(40)]
    Path("text").mkdir()
    for i in range(18):
        name = f"{'train' if i < 16 else 'heldout'}-{i:02}.txt"
        Path("text", name).write_text(" ".join(random.choice(words, random.integers(5, 60))))
    Path("rewards.py").write_text(REWARD)


def train(run_dir: str, stop: tuple[str, int] | None = None) -> None:
    """Run both stages, or until a signal would stop the run after a step of a stage."""
    recipe = dataclasses.replace(RECIPE, run_dir=run_dir)
    directory, console = open_run(recipe), Console(enabled=True)
    original = Signals.stop
    for name, stage in (("pretrain", pretrain), ("rl", reinforce)):
        if stop and stop[0] == name:
            Signals.stop = lambda self, step: step == stop[1]
        try:
            stage(recipe, directory, console)
        except Interrupted:
            return
        finally:
            Signals.stop = original


def printed(*args: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert mla_moe_main(args) == 0
    return out.getvalue()


def stored(state: Path) -> dict[bytes, bytes]:
    """The contents of an OCDBT database."""
    base = {"driver": "file", "path": f"{state.absolute()}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


def drop_garbage(state: Path) -> None:
    """Remove the files of an OCDBT database that nothing in it refers to: Orbax leaves those of its first commits."""
    wanted = stored(state)
    for file in [p for p in state.glob("ocdbt.process_*/**/*") if p.is_file()]:
        content = file.read_bytes()
        file.unlink()
        try:
            needed = stored(state) != wanted
        except ValueError:
            needed = True
        if needed:
            file.write_bytes(content)


def main(path: Path) -> None:
    setup.make_mesh = lambda sizes: make_mesh(sizes, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_inputs()
        train("finished")
        train("stopped", ("pretrain", 2))
        shutil.copytree("stopped", "pretrain_half")
        train("stopped", ("rl", 1))
        shutil.copytree("stopped", "rl_half")
        shutil.rmtree("stopped")
        write_report(Path("finished"))
        expected = {
            "environment": environment(),
            "eval": json.loads(printed("eval", "finished", "--prompts", "4", "--samples", "2", "--json")),
            "generate": printed("generate", "finished", "--prompt", "ab", "--max-new-tokens", "8"),
        }
        Path("expected.json").write_text(json.dumps(expected, indent=2))
        for run in ("finished", "pretrain_half", "rl_half"):
            shutil.rmtree(Path(run, "tensorboard"))
            Path(run, "report.html").unlink(missing_ok=True)
            for state in Path(run).glob("checkpoints/*/*/state"):
                drop_garbage(state)
        same = [Path(run, "checkpoints", "pretrain") for run in ("finished", "rl_half")]
        assert stored(same[0] / "4" / "state") == stored(same[1] / "4" / "state")
        shutil.rmtree(same[1])
        shutil.copytree(*same)  # other files with the same contents; the archive stores equal files once
        with tarfile.open(path, "w:xz") as archive:
            for file in sorted(p for p in Path().rglob("*") if p.is_file()):
                archive.add(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
