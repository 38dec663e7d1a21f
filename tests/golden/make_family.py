"""Make `family/`: what Hugging Face `transformers` computes of the tiny random models in `family.py`.

Needs PyTorch and `transformers == 5.24.0`, which neither the package nor its tests need:

    python tests/golden/make_family.py [CASE …]         write the files
    python tests/golden/make_family.py --check DIR      compare DIR/CASE, which `export_family.py` exported

`CASE.npz` has the names and shapes of the tensors in a released checkpoint (`tensors`, JSON), `logits` of the batch,
with an MTP module its `mtp_logits` of the first row, `gradients` of what `names` lists as in `family.projections`, and
`text`, what greedy decoding makes of the prompts. All is float32 with eager attention; float64 gives the same, so
nothing hangs on rounding.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from family import CASES, HERE, NEW_TOKENS, batch, cotangent, projections, prompts, weight, weights
from make import mtp_logits, mtp_names
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def auto_class(config: dict):
    """Models with a vision tower, and transformers' only class of Mistral 4, are not among those of causal models."""
    vision = "text_config" in config or config["model_type"] == "mistral4"
    return transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM


def experts_as_released(init):
    """LongCat-Flash without gate and up projections of zero-computation experts, which transformers 5.24.0 creates and
    never uses: no released file has them, and it loads none without this."""

    def without(self, config):
        init(self, config)
        self.gate_up_proj = torch.nn.Parameter(self.gate_up_proj[: self.num_routed_experts].detach())

    return without


LongcatFlashExperts.__init__ = experts_as_released(LongcatFlashExperts.__init__)


def load(directory: Path, dtype: torch.dtype):
    config = json.loads((directory / "config.json").read_text())
    model, info = auto_class(config).from_pretrained(directory, dtype=dtype, output_loading_info=True, **EAGER)
    missing = [name for name in info["missing_keys"] if config.get("topk_method") != "none" or "bias" not in name]
    assert not missing, info
    model.generation_config.eos_token_id = None
    return model.eval()


def logits(model, case: str) -> torch.Tensor:
    arrays = {name: torch.from_numpy(array).long() for name, array in batch(case).items()}
    segments, T = arrays["segment_ids"], 20
    seen = torch.tril(torch.ones(T, T, dtype=torch.bool)) & (segments[:, :, None] == segments[:, None, :])
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)[:, None]
    out = model(arrays["tokens"], attention_mask=mask, position_ids=arrays["positions"], use_cache=False)
    return out.logits


@contextlib.contextmanager
def no_ties():
    """Of the scores of an indexer, which are of three axes: that which keys are the highest hangs on no order."""
    topk = torch.Tensor.topk

    def checked(scores: torch.Tensor, k: int, *args, **kwargs):
        if scores.ndim == 3 and k < scores.shape[-1]:
            last, next = topk(scores, k + 1, dim=-1).values[..., -2:].unbind(-1)
            assert ((last - next > 1e-5) | (next < -1e30)).all(), "two keys have the same score"
        return topk(scores, k, *args, **kwargs)

    torch.Tensor.topk = checked
    try:
        yield
    finally:
        torch.Tensor.topk = topk


def greedy(model, case: str) -> np.ndarray:
    rows = []
    for prompt in prompts(case):
        tokens = torch.tensor([prompt])
        real = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=real, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        rows.append(out[0, len(prompt) :].numpy())
    return np.stack(rows).astype(np.int8)


def released_name(name: str) -> str:
    """transformers saves the layers of Kimi-K2.5's language model as `blocks`, the vision tower's name for them."""
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
    return name.removeprefix("model.") if "mm_projector" in name else name


def released(case: str, config: dict, directory: Path) -> dict[str, list[int]]:
    """Write random weights under released names, which saving a new model shows; returns the names with shapes."""
    (directory / "config.json").write_text(json.dumps(config))
    auto = transformers.AutoConfig.from_pretrained(directory)
    model = auto_class(config).from_config(auto, dtype=torch.float32)
    model.save_pretrained(directory / "names")
    names = load_file(directory / "names" / "model.safetensors")
    shapes = {released_name(name): list(tensor.shape) for name, tensor in sorted(names.items())}
    if config.get("num_nextn_predict_layers"):
        layers = mtp_names(mtp_model(model), config["num_hidden_layers"])
        shapes |= {name: list(tensor.shape) for name, tensor in layers.items()}
    if config.get("topk_method") == "none":  # A.X-K1's files are without bias, which transformers takes for 0
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith("bias")}
    as_torch = {name: torch.from_numpy(value) for name, value in weights(case, shapes).items()}
    as_torch = {name: value if name.endswith("bias") else value.bfloat16() for name, value in as_torch.items()}
    save_file(as_torch, directory / "model.safetensors", metadata={"format": "pt"})
    return shapes


def gradients(model, case: str) -> dict[str, np.ndarray]:
    """Gradients under released names: they are put in place of the parameters, and saved."""
    (logits(model, case) * torch.from_numpy(cotangent(case))).sum().backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        saved = load_file(Path(directory) / "model.safetensors")
    return {released_name(name): t.numpy() for name, t in sorted(saved.items()) if not name.endswith("correction_bias")}


def mtp_model(model) -> MtpModel:
    """DeepSeek-V3's MTP module of the model's own layers, also where transformers ignores the released one."""
    model.config.num_mtp_layers, model.config.mtp_mlp_layer_types = 1, ["sparse"]
    model.config.mtp_layer_types = getattr(model.config, "layer_types", None) and model.config.layer_types[-1:]
    mtp = MtpModel(model, 1)
    mtp.config._attn_implementation = mtp.config._experts_implementation = "eager"
    mtp.config.layer_types = None  # whose `indexed_attention` it has no mask for; it is the causal one
    return mtp


def first_row_mtp_logits(model, case: str, config: dict) -> np.ndarray:
    """Logits of the MTP module on the first row of the batch."""
    mtp, tokens = mtp_model(model), torch.from_numpy(batch(case)["tokens"][:1]).long()
    layer = f"model.layers.{config['num_hidden_layers']}."
    for name, part in mtp_names(mtp, config["num_hidden_layers"]).items():  # views of its parameters
        if name not in (f"{layer}embed_tokens.weight", f"{layer}shared_head.head.weight"):
            part.copy_(torch.from_numpy(weight(case, name, tuple(part.shape))))
    hidden = model.model(tokens, use_cache=False).last_hidden_state
    row = {"tokens": batch(case)["tokens"][:1], "positions": batch(case)["positions"][:1]}
    return mtp_logits(model, mtp, hidden, row).numpy()


def make(case: str, config: dict) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        shapes = released(case, config, Path(temporary))
        model, exact = (load(Path(temporary), dtype) for dtype in (torch.float32, torch.float64))
    with torch.no_grad(), no_ties():
        value, precise = logits(model, case), logits(exact, case)
        real = torch.from_numpy(batch(case)["segment_ids"]) != 0
        error = (value - precise)[real].abs().max()
        assert error < 1e-4, f"{case}: a choice of experts hangs on rounding, {error}"
    with no_ties():
        text = greedy(model, case)
    assert (text == greedy(exact, case)).all(), f"{case}: the text hangs on rounding"
    arrays = {"logits": value.numpy(), "text": text, "tensors": np.array(json.dumps(shapes))}
    if config.get("num_nextn_predict_layers"):
        with torch.no_grad():
            arrays["mtp_logits"] = first_row_mtp_logits(model, case, config)
    by_name = gradients(model, case)
    arrays["names"] = np.array(json.dumps(list(by_name)))
    arrays["gradients"] = np.stack([projections(case, n, g) for n, g in by_name.items()])
    np.savez_compressed(HERE / f"{case}.npz", **arrays)
    print(f"{case:20} logits std {value.std():.2f}, {len(np.unique(text))} different tokens in {text.size}")


def check(directory: Path) -> None:
    for case in CASES:
        if (directory / case).is_dir():
            expected = np.load(HERE / f"{case}.npz")["logits"]
            with torch.no_grad():
                got = logits(load(directory / case, torch.float32), case).numpy()
            error = np.abs(got - expected)[batch(case)["segment_ids"] != 0].max()
            print(f"{case:20} exported by the package: logits differ by at most {error:.1e}")
            assert error < 2e-4


if __name__ == "__main__":
    assert transformers.__version__ == "5.24.0", "SPEC: the oracle is transformers 5.24.0"
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--check"]:
        check(Path(sys.argv[2]))
    for name in sys.argv[1:] or CASES:
        if name in CASES:
            make(name, dict(CASES[name]))
