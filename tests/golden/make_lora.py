"""Make `lora/` beside this script: adapters of the model in `k2`, and what PEFT and `transformers` compute of them.

    python tests/golden/export_lora.py            # with this package: writes lora/exported
    python tests/golden/make_lora.py              # without it

Needs PyTorch, `transformers == 5.24.0` and `peft == 0.21.2`. Everything is computed in float32. In the directory:

    initial, trained      PEFT's adapters of all matrices, before and after 20 steps of AdamW
    expected.npz          tokens        [20, 2, 17], a batch for each step
                          loss/CASE     losses of the steps with adapters of `attention`, `shared`, `experts` or `all`
                                        matrices, from the initial adapters; `all` includes dense MLPs and the router
                          trained       logits of the trained adapters (case `all`) of the first batch
                          exported      logits of the adapters that this package wrote
"""

from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent
TARGETS = {
    "attention": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "shared": [f"shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")],
    "experts": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "others": ["mlp.gate.weight", *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))],
}
CASES = {name: [name] for name in ("attention", "shared", "experts")} | {"all": list(TARGETS)}
STEPS, RATE = 20, 0.01


def base() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "k2", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )


def adapted(groups: list[str]) -> torch.nn.Module:
    """A is PEFT's own initialisation of `all`, in each case the same."""
    names = [name for group in groups if group != "attention" for name in TARGETS[group]]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, task_type="CAUSAL_LM", target_parameters=names,
        target_modules=TARGETS["attention"] if "attention" in groups else [],
    )  # fmt: skip
    torch.manual_seed(0)
    return peft.get_peft_model(base(), config)


def train(model: torch.nn.Module, batches: torch.Tensor) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    for tokens in batches:
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(model: torch.nn.Module, name: str) -> None:
    model.save_pretrained(HERE / "lora" / name)
    (HERE / "lora" / name / "README.md").unlink()
    path = HERE / "lora" / name / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"{HERE / "k2"}"', '"../../k2"'))


def main() -> None:
    batches = torch.from_numpy(np.random.default_rng(0).integers(3, 32, (STEPS, 2, 17)))
    found = {"tokens": batches.numpy()}
    first = adapted(CASES["all"])
    save(first, "initial")
    initial = first.state_dict()
    for case, groups in CASES.items():
        model = adapted(groups)
        model.load_state_dict({name: x for name, x in initial.items() if "lora" in name}, strict=False)
        found[f"loss/{case}"] = np.array(train(model, batches))
        print(case, found[f"loss/{case}"][[0, -1]])
    save(model, "trained")
    with torch.no_grad():
        found["trained"] = model(batches[0]).logits.numpy()
        exported = peft.PeftModel.from_pretrained(base(), HERE / "lora" / "exported")
        found["exported"] = exported(batches[0]).logits.numpy()
        print("effect", np.abs(found["exported"] - base()(batches[0]).logits.numpy()).max())
    np.savez_compressed(HERE / "lora" / "expected.npz", **found)


if __name__ == "__main__":
    main()
