import dataclasses

import pytest
from flax import nnx

import mla_moe
from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)


@pytest.fixture(scope="session")
def recipe(cfg):
    """An RL stage that takes seconds, from an untrained model."""
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, vocab_size=258, num_nextn_predict_layers=0),
        data=DataConfig(tokenizer="byte"),
        training=TrainingConfig(steps=0, batch_size=8, loss_chunk=16),
        task=TaskConfig(template="{question}=", options=("least=1", "most=2")),
        sft=SFTConfig(sequence_length=64),
        rl=RLConfig(
            steps=3,
            prompts_per_step=4,
            group_size=4,
            minibatches=2,
            max_prompt_tokens=16,
            max_new_tokens=8,
            kl_coef=0.01,
            ref_sync_steps=2,
            micro_batch_size=8,
            max_num_seqs=8,
            eval_every=2,
            eval_prompts=4,
            eval_samples=2,
            optimizer=OptimizerConfig(
                schedule=ScheduleConfig(peak_lr=1e-2, warmup_fraction=0.0, decay_fraction=0.5, final_lr_fraction=0.4),
                weight_decay=0.0,
            ),
        ),
        checkpoint=CheckpointConfig(every=2),
    )


@pytest.fixture(scope="session")
def base(recipe, tmp_path_factory):
    """A checkpoint of an untrained model."""
    path = tmp_path_factory.mktemp("base") / "model"
    mla_moe.save_pretrained(mla_moe.Transformer(recipe.model, rngs=nnx.Rngs(0)), path)
    return str(path)
