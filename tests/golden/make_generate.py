"""Make `generate.npz` beside two of the golden models: what Hugging Face `transformers` generates of their files.

Needs PyTorch and `transformers == 5.23.0`, which neither the package nor its tests need:

    python tests/golden/make_generate.py

64 prompts of 1 to 300 random tokens, joined in `prompts` with their `lengths`, and the 64 tokens that greedy decoding
in float32 makes of each (`new`). Prompts are drawn again where float64 gives others: those hang on rounding.
"""

from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
CASES = ("v2_group_limited", "v3")
PROMPTS, LONGEST, NEW = 64, 300, 64


def load(directory: Path, dtype: torch.dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    model.set_experts_implementation("eager")
    model.generation_config.eos_token_id = None
    return model


def greedy(model, prompt: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(prompt).long()[None]
    real = torch.ones_like(tokens)  # or every token 0 would be taken for padding
    out = model.generate(tokens, attention_mask=real, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].numpy()


def make(case: str, seed: int) -> None:
    directory = HERE / case
    vocab = transformers.AutoConfig.from_pretrained(directory).vocab_size
    rng = np.random.default_rng(seed)
    lengths = np.linspace(1, LONGEST, PROMPTS).round().astype(np.int32)
    models = [load(directory, dtype) for dtype in (torch.float32, torch.float64)]
    prompts, rows, drawn = [], [], 0
    for length in rng.permutation(lengths):
        new, precise = np.zeros(1), np.ones(1)
        while (new != precise).any():
            prompt, drawn = rng.integers(0, vocab, length).astype(np.int8), drawn + 1
            new, precise = (greedy(model, prompt) for model in models)
        prompts, rows = [*prompts, prompt], [*rows, new]
    new = np.stack(rows)
    print(f"{case}: {len(np.unique(new))} different tokens in {new.size}; {drawn} prompts drawn")
    np.savez_compressed(
        directory / "generate.npz",
        prompts=np.concatenate(prompts),
        lengths=[len(p) for p in prompts],
        new=new.astype(np.int8),
    )


if __name__ == "__main__":
    assert transformers.__version__ == "5.23.0", "SPEC: the oracle is transformers 5.23.0"
    torch.set_num_threads(1)
    for number, name in enumerate(CASES):
        make(name, seed=number)
