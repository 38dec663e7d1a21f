"""DeepSeek-R1-Zero: RL on a 671 B base model with the published settings (arXiv 2501.12948, and its supplement):
learning rate 3e-6, KL coefficient 1e-3, temperature 1, 16 completions of each of 32 prompts per update, 16 updates per
rollout of 8,192 completions, the reference policy replaced every 400 updates, 10,400 updates in total.

    mla-moe convert path/to/DeepSeek-V3-Base path/to/orbax --to orbax
    python train.py configs/r1_zero_v3.py --init-from path/to/orbax \\
        --data.tokenizer path/to/DeepSeek-V3-Base/tokenizer.json --task.name path/to/questions.jsonl

Prompts are JSON lines with `question` and `answer`. The published run allowed 65,536 tokens per completion after 8,200
updates: continue from the last checkpoint with `--init-from runs/r1-zero-v3 --run-dir … --rl.max-new-tokens 65536`.
The mesh is for 1,024 TPU v5p; on half as many two chips share a sequence (docs/plan.md):

    mla-moe plan configs/r1_zero_v3.py --topology v5p:8x8x16 --stage rl
    mla-moe plan configs/r1_zero_v3.py --topology v5p:8x8x8 --stage rl --mesh.fsdp 4 --mesh.context 2 \\
        --rl.micro_batch_size 256 --rl.max_num_seqs 512
"""

from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    ScheduleConfig,
    TaskConfig,
    TrainingConfig,
    preset,
)

UPDATES_PER_STEP = 16

recipe = Recipe(
    run_dir="runs/r1-zero-v3",
    model=preset("deepseek-v3"),
    init_from="path/to/orbax",
    data=DataConfig(tokenizer="path/to/tokenizer.json"),
    mesh=MeshConfig(data=1, fsdp=16, expert=64),
    training=TrainingConfig(steps=0, batch_size=512, remat="full"),
    task=TaskConfig(name="path/to/questions.jsonl", template="r1_zero"),
    rl=RLConfig(
        steps=10_400 // UPDATES_PER_STEP,
        objective="grpo",
        prompts_per_step=32 * UPDATES_PER_STEP,
        group_size=16,
        minibatches=UPDATES_PER_STEP,
        max_prompt_tokens=1024,
        max_new_tokens=32_768 - 1024,
        temperature=1.0,
        kl_coef=1e-3,
        ref_sync_steps=400 // UPDATES_PER_STEP,
        micro_batch_size=1024,
        max_num_seqs=1024,
        eval_every=25,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=3e-6, warmup_fraction=0.0, decay_fraction=0.0), weight_decay=0.0
        ),
    ),
    checkpoint=CheckpointConfig(every=25),
)
