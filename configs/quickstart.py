"""DeepSeek's recipe in miniature: pretraining, then reasoning by RL from rule rewards alone.

    python train.py configs/quickstart.py

A small MLA + MoE model is pretrained on the source code and the manual of the running Python, mixed with arithmetic
problems whose solutions have several styles: most give the answer directly, some take a shortcut, a few reason step by
step, some are incorrect or without format. Held-out files then need fewer bits per byte than with `gzip -9`. RL uses
other problems, and rewards only the format and the correct answer. About 10 minutes on 2 cores.
"""

from mla_moe.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RLConfig,
    SampleConfig,
    ScheduleConfig,
    TaskConfig,
    TrainingConfig,
)
from mla_moe.data.arithmetic import QUESTION

recipe = Recipe(
    run_dir="runs/quickstart",
    model=ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        moe_intermediate_size=96,
        n_routed_experts=16,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=48,
        q_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=512,
        # To copy the next operation of a question the model must tell neighbouring positions apart: with the usual 1e4
        # half of the rotary frequencies hardly change within a text of this length (docs/decisions/quickstart-rl.md).
        rope_theta=100.0,
        initializer_range=0.02,
    ),
    # A batch from a single file would load few experts: shuffle over half a million tokens.
    data=DataConfig(train=("cpython:train", "arithmetic:train"), tokenizer="bpe:2048", shuffle_buffer_size=2048),
    optimizer=OptimizerConfig(
        name="muon",
        # Such a short run needs high learning rates (8e-3 for both, shuffling 256 sequences: 1.88 bits; these: 1.74).
        schedule=ScheduleConfig(peak_lr=2e-2, warmup_fraction=0.02, decay_fraction=0.6, final_lr_fraction=0.02),
        muon_peak_lr=1e-2,
    ),
    training=TrainingConfig(
        steps=360, batch_size=16, sequence_length=256, router_bias_update_rate=1e-2, aux_loss_weight=3e-3
    ),
    task=TaskConfig(name="arithmetic", template=QUESTION, format_weight=0.2),
    rl=RLConfig(
        steps=20,
        # Long correct completions weigh as much as short incorrect ones. With a learning rate that is too high, some
        # other objectives learn the shortcut.
        objective="dapo",
        max_resample_rounds=2,
        prompts_per_step=48,
        group_size=8,
        minibatches=2,
        max_prompt_tokens=24,
        max_new_tokens=72,
        packed_length=192,
        micro_batch_size=24,
        max_num_seqs=128,
        # With twice the learning rate some seeds forget how to copy. The fewer groups still differ, the more gradients
        # fluctuate: with a smaller beta2 accuracy may fall back.
        optimizer=OptimizerConfig(
            schedule=ScheduleConfig(peak_lr=3e-4, warmup_fraction=0.0, decay_fraction=0.9, final_lr_fraction=0.05),
            beta2=0.99,
            weight_decay=0.0,
        ),
        eval_every=5,
    ),
    checkpoint=CheckpointConfig(every=100),
    sample=SampleConfig(prompts=("def read_lines(path):\n", "class Queue:\n    ", "7*2-2*1-7 = ?\n")),
)
