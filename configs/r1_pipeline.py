"""DeepSeek-R1's four stages in miniature: cold start, reinforcement learning, rejection sampling, fine-tuning.

    python train.py configs/r1_pipeline.py

A small model is pretrained on arithmetic problems with solutions in several styles, most of them without all reasoning
steps. SFT on forty completions with every step trains the format (`sft`, the cold start). RL follows (`rl`): its twelve
steps are too few for so small a model to become more accurate (17 % before and 16 % after). At last the RL model
generates completions of training prompts, and the pretrained model is fine-tuned on the correct ones alone
(`rejection`).
"""

from pathlib import Path

from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RejectionConfig,
    RLConfig,
    ScheduleConfig,
    SFTConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.data.arithmetic import QUESTION

recipe = Recipe(
    run_dir="runs/r1_pipeline",
    model=ModelConfig(
        vocab_size=258,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=288,
        moe_intermediate_size=72,
        n_routed_experts=8,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_nope_head_dim=24,
        qk_rope_head_dim=16,
        v_head_dim=24,
        max_position_embeddings=256,
        initializer_range=0.02,
    ),
    data=DataConfig(train=("arithmetic:train",), heldout=("arithmetic:heldout",), tokenizer="byte"),
    optimizer=OptimizerConfig(
        name="muon",
        schedule=ScheduleConfig(peak_lr=2e-2, warmup_fraction=0.02, decay_fraction=0.6, final_lr_fraction=0.02),
        muon_peak_lr=1e-2,
    ),
    training=TrainingConfig(
        steps=200, batch_size=16, sequence_length=192, router_bias_update_rate=1e-2, aux_loss_weight=3e-3
    ),
    task=TaskConfig(name="arithmetic", template=QUESTION),
    sft=SFTConfig(
        steps=12,
        data=(str(Path(__file__).with_suffix(".jsonl")),),
        batch_size=8,
        sequence_length=192,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=5e-4, warmup_fraction=0.1, decay_fraction=0.9, final_lr_fraction=0.1),
            weight_decay=0.0,
        ),
    ),
    rl=RLConfig(
        steps=12,
        prompts_per_step=48,
        group_size=8,
        minibatches=2,
        max_prompt_tokens=32,
        max_new_tokens=96,
        packed_length=192,
        micro_batch_size=24,
        max_num_seqs=128,
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=1e-3, warmup_fraction=0.0, decay_fraction=1.0, final_lr_fraction=0.1),
            weight_decay=0.0,
        ),
    ),
    rejection=RejectionConfig(steps=60, prompts=512, samples=4, keep=1, start="base"),
    checkpoint=CheckpointConfig(every=100),
)
