import dataclasses

import pytest

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
    """A stage so small that it takes seconds, from a model that has learned nothing."""
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
