"""Every architecture of the registry through all stages: SFT, RL and a plan of it, generation and the server, of tiny
random models. What they compute is compared with transformers in `checkpoint/test_golden.py` and `test_family.py`."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx

import mla_moe
from mla_moe import ModelConfig
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.config.architectures import ARCHITECTURES
from mla_moe.inference.engine import Engine
from mla_moe.nn.abstract_model import model_arrays
from mla_moe.plan.plan import make_plan
from mla_moe.plan.topology import open_topology
from mla_moe.rl.trainer import train_rl
from mla_moe.training.console import Console
from mla_moe.training.metrics import read_rows
from mla_moe.training.run_directory import open_run_directory
from mla_moe.training.sft import train_sft
from tests.golden.family import CASES
from tests.inference.serving import TOKENIZER, call, decode, server, serving

pytestmark = pytest.mark.slow
ADAMW = OptimizerConfig(schedule=ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.0), weight_decay=0.0)
SIZES = {
    "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "num_nextn_predict_layers": 0,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip


def tiny(architecture, v2_cfg):
    """Two layers of an architecture, in sizes that all have, so that equal modules share compiled programs."""
    name = architecture.model_type
    if name == "deepseek_v2":
        base = v2_cfg
    else:
        base = ModelConfig.from_hf(CASES["glm4_moe_lite_1" if name == "deepseek_v3" else f"{name}_1"])
    sizes = SIZES | {
        "model_type": architecture.field_value,
        "first_k_dense_replace": min(base.first_k_dense_replace, 1),
    }
    if base.num_moe_layers:
        sizes |= EXPERTS
    else:
        sizes |= {"first_k_dense_replace": 2}
    if base.index_topk is not None:
        sizes |= {"index_topk": 6, "indexer_types": base.indexer_types and ("full", "shared")}
    return dataclasses.replace(base, **sizes)


LIKE_OTHERS = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1", "glm4_moe_lite", "kimi_k25", "youtu")
"""Every module of these is in the tests of the stages themselves, or in one of the other architectures."""


def architectures():
    for architecture in dict.fromkeys(ARCHITECTURES.values()):
        marks = [pytest.mark.thorough] if architecture.model_type in LIKE_OTHERS else []
        yield pytest.param(architecture, id=architecture.model_type, marks=marks)


@pytest.fixture(scope="module", params=architectures())
def recipe(request, v2_cfg, tmp_path_factory):
    """Both stages, of two steps each, from a checkpoint in the architecture's own layout."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "reward.py").write_text("def short(prompt, completion, example):\n    return -len(completion) / 8\n")
    (folder / "pairs.jsonl").write_text(
        "\n".join(json.dumps({"question": q, "completion": q[::-1]}) for q in "abcdefgh")
    )
    model = tiny(request.param, v2_cfg)
    mla_moe.save_pretrained(mla_moe.Transformer(model, rngs=nnx.Rngs(0)), folder / "base")
    assert json.loads((folder / "base" / "config.json").read_text())["model_type"] == request.param.model_type
    return Recipe(
        run_dir=str(folder / "run"),
        init_from=str(folder / "base"),
        model=model,
        mesh=MeshConfig(data=2, fsdp=2, expert=2),
        data=DataConfig(tokenizer="byte"),
        training=TrainingConfig(steps=0, batch_size=8, loss_chunk=16),
        task=TaskConfig(
            template="{question}=", options=("least=1", "most=2"), format_weight=0.0, accuracy_weight=0.0,
            reward_functions=(f"{folder}/reward.py:short",),
        ),
        sft=SFTConfig(
            steps=2, data=(f"{folder}/pairs.jsonl",), batch_size=8, sequence_length=16, optimizer=ADAMW,
            router_bias_update_rate=1e-3,
        ),
        rl=RLConfig(
            steps=2, prompts_per_step=4, group_size=4, max_prompt_tokens=16, max_new_tokens=8, micro_batch_size=8,
            max_num_seqs=8, kl_coef=0.0, eval_prompts=4, eval_samples=1, optimizer=ADAMW,
        ),
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip


def test_trains_in_both_stages_and_the_result_is_served(recipe):
    directory = open_run_directory(recipe)
    train_sft(recipe, directory, Console(enabled=True))
    tuned = mla_moe.load_pretrained(directory)
    train_rl(recipe, directory, Console(enabled=True))
    rows = list(read_rows(directory / "metrics.jsonl"))
    losses = {
        stage: [row["loss"] for row in rows if row["stage"] == stage and "loss" in row] for stage in ("sft", "rl")
    }
    assert [len(values) for values in losses.values()] == [2, 2]
    assert np.isfinite([*losses["sft"], *losses["rl"]]).all()
    differences = [row["sampler_logprob_diff_max"] for row in rows if "sampler_logprob_diff_max" in row]
    assert 0 < max(differences) < 1e-4, "the sampler computes what the learner does"
    base, after = (model_arrays(m) for m in (mla_moe.load_pretrained(recipe.init_from), tuned))
    assert base.keys() == after.keys()
    still = [path for path in base if "indexer" not in path and (np.asarray(base[path]) == after[path]).all()]
    assert not still, "SFT trains every parameter but those of indexers"

    prompts = [[1, 40, 41], [1, *range(40, 60)]]
    model = mla_moe.load_pretrained(directory)
    new = mla_moe.generate(model, prompts, max_new_tokens=6)
    engine = Engine(model, max_num_seqs=2, max_model_len=64, decode=decode)
    with serving(server.application(engine, TOKENIZER, "tiny", max_waiting=8)) as port:
        for prompt, tokens in zip(prompts, new, strict=True):
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0}
            status, value = call(port, "/v1/completions", body)
            (stop,) = TOKENIZER.stop_ids
            text = TOKENIZER.decode(tokens[: tokens.index(stop)] if stop in tokens else tokens)
            assert (status, value["choices"][0]["text"]) == (200, text)


def test_is_planned(recipe):
    plan = make_plan(recipe, open_topology("cpu:8"), stage="sft")
    assert plan.fits
