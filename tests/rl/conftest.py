import dataclasses

import pytest

from mla_moe.recipe import RL, SFT, Checkpoint, Data, Optimizer, Recipe, Schedule, Task, Training


@pytest.fixture(scope="session")
def recipe(cfg):
    """A stage so small that it takes seconds, from a model that has learned nothing."""
    return Recipe(
        run_dir="",
        model=dataclasses.replace(cfg, vocab_size=258, num_nextn_predict_layers=0),
        data=Data(tokenizer="byte"),
        training=Training(steps=0, batch_size=8, loss_chunk=16),
        task=Task(template="{question}=", options=("least=1", "most=2")),
        sft=SFT(sequence_length=64),
        rl=RL(
            steps=3,
            prompts=4,
            group_size=4,
            minibatches=2,
            max_prompt_tokens=16,
            max_new_tokens=8,
            kl=0.01,
            reference_every=2,
            rows=8,
            slots=8,
            eval_every=2,
            eval_prompts=4,
            eval_samples=2,
            optimizer=Optimizer(schedule=Schedule(peak=1e-2, warmup=0.0, decay=0.5, final=0.4), weight_decay=0.0),
        ),
        checkpoint=Checkpoint(every=2),
    )
