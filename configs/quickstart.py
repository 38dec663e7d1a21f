"""A small MLA + MoE model on the Python that runs it: sources of the standard library, and the language reference.

    python train.py configs/quickstart.py

About 4 minutes on 2 cores. Held-out files then take fewer bits a byte than `gzip -9` needs for them.
"""

from mla_moe.config import ModelConfig
from mla_moe.recipe import Checkpoint, Data, Optimizer, Recipe, Sample, Schedule, Training

recipe = Recipe(
    run_dir="runs/quickstart",
    model=ModelConfig(
        vocab_size=4096,
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=512,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        routed_scaling_factor=1.0,
        max_position_embeddings=512,
        initializer_range=0.02,
    ),
    data=Data(tokenizer="bpe:4096"),
    optimizer=Optimizer(name="muon", schedule=Schedule(peak=4e-3, warmup=0.02, decay=0.6, final=0.05)),
    training=Training(steps=400, batch_size=16, sequence_length=256),
    checkpoint=Checkpoint(every=100),
    sample=Sample(prompts=("def read_lines(path):\n", "class Queue:\n    ", "import ")),
)
