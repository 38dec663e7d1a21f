"""Make `dpo.npz` beside this script: losses of preference pairs and their gradients, by TRL's `DPOTrainer`.

    python tests/golden/make_dpo.py

Needs PyTorch, `transformers == 5.23.0` and `trl == 1.16.0`. The policy is the model in `k2`; the reference is the same
with its head times 0.75. The pairs are of uneven lengths. In the file:

    prompt, chosen, rejected      token ids [pairs, T], −1 is padding; completions end in eos
    LOSS/loss                     of `sigmoid` (DPO), `ipo` and `sigmoid_norm`, with β = 0.3
    LOSS/NAME                     gradient of some tensors, by their names in the checkpoint
    rewards                       `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`
"""

import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
NAMES = (
    "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight",
    "model.layers.1.self_attn.kv_a_proj_with_mqa.weight", "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.experts.3.down_proj.weight",
)  # fmt: skip
LENGTHS = [(3, 4, 7), (1, 9, 2), (6, 1, 1), (2, 5, 5), (8, 3, 12)]
KEYS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Token `i` is spelled `<i>`."""
    model = tokenizers.models.WordLevel({f"<{i}>": i for i in range(32)}, unk_token="<2>")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<1>", pad_token="<1>")


def model() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "k2", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def main() -> None:
    generator = np.random.default_rng(0)
    pairs = [[generator.integers(3, 32, size).tolist() for size in sizes] for sizes in LENGTHS]
    text = [[" ".join(f"<{i}>" for i in ids) + " " * (k == 0) for k, ids in enumerate(pair)] for pair in pairs]
    data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in text])
    found = {}
    for loss_type in ("sigmoid", "ipo", "sigmoid_norm"):
        policy, reference = model(), model()
        with torch.no_grad():
            reference.lm_head.weight *= 0.75
        with tempfile.TemporaryDirectory() as directory:
            args = DPOConfig(
                directory, loss_type=loss_type, beta=0.3, per_device_train_batch_size=8, use_cpu=True, bf16=False,
                report_to=[], max_length=None, gradient_checkpointing=False, router_aux_loss_coef=0.0,
            )  # fmt: skip
            trainer = DPOTrainer(policy, reference, args, train_dataset=data, processing_class=tokenizer())
            examples = list(trainer.train_dataset)
            loss = trainer.compute_loss(policy, trainer.data_collator(examples))
        loss.backward()
        gradients = {name: parameter.grad.numpy() for name, parameter in policy.named_parameters()}
        found[f"{loss_type}/loss"] = np.float64(loss.item())
        for name in NAMES:
            if name in gradients:
                found[f"{loss_type}/{name}"] = gradients[name]
            else:  # transformers stacks the experts
                stacked = gradients["model.layers.1.mlp.experts.down_proj"]
                found[f"{loss_type}/{name}"] = stacked[3]
        if loss_type == "sigmoid":
            found["rewards"] = np.array(
                [trainer._metrics["train" if policy.training else "eval"][key][0] for key in KEYS]
            )
    for name in ("prompt", "chosen", "rejected"):
        rows = [example[f"{name}_ids"] for example in examples]
        width = max(map(len, rows))
        found[name] = np.array([row + [-1] * (width - len(row)) for row in rows])
    assert found["chosen"].shape[1] == max(size for _, size, _ in LENGTHS) + 1, "with eos"
    np.savez_compressed(HERE / "dpo.npz", **found)
    print({name: value for name, value in found.items() if name.endswith("loss") or name == "rewards"})


if __name__ == "__main__":
    main()
