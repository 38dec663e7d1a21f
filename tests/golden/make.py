"""Make the golden files beside this script: small random models, and what Hugging Face `transformers` computes of them.

Needs PyTorch and `transformers == 5.23.0`, which neither the package nor its tests need:

    python tests/golden/make.py

Each case is a directory that looks like a released checkpoint (`config.json`, `model.safetensors` in bfloat16), with

    expected.npz        per batch (`plain`, `long`, `padded`, `packed`): tokens, segments (0 is padding), positions,
                        logits, and per expert layer the sorted experts of each token; `mtp_logits` of the MTP module
                        on `plain`
    gradients.npz       for two cases: the gradient by tensor name of `CE + 0.3 · CE of the MTP module`, where there
                        is one, on `plain`

Everything is computed in float32 with eager attention. Router choices are the same in float64, so that they do not hang
on rounding.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

HERE = Path(__file__).parent
COMMON = dict(
    vocab_size=32, hidden_size=24, intermediate_size=40, moe_intermediate_size=10, num_hidden_layers=2,
    first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=12, qk_nope_head_dim=10,
    qk_rope_head_dim=8, v_head_dim=6, n_shared_experts=1, hidden_act="silu", tie_word_embeddings=False,
    attention_bias=False, attention_dropout=0.0, moe_layer_freq=1, initializer_range=0.02, rms_norm_eps=1e-6,
    rope_theta=10000, bos_token_id=0, eos_token_id=1, torch_dtype="bfloat16", num_nextn_predict_layers=0,
)  # fmt: skip
V2 = COMMON | dict(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", scoring_func="softmax", norm_topk_prob=False,
    n_shared_experts=2, max_position_embeddings=1280,
    rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=32, beta_fast=32, beta_slow=1,
                      mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip
V3 = COMMON | dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", scoring_func="sigmoid", topk_method="noaux_tc",
    norm_topk_prob=True, max_position_embeddings=1280, q_lora_rank=14,
    rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=32, beta_fast=32, beta_slow=1,
                      mscale=1.0, mscale_all_dim=1.0),
)  # fmt: skip
CASES = {
    "v2_greedy": V2 | dict(
        topk_method="greedy", q_lora_rank=None, n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1,
        routed_scaling_factor=1.0,
    ),
    "v2_group_limited": V2 | dict(
        topk_method="group_limited_greedy", q_lora_rank=14, n_routed_experts=16, num_experts_per_tok=4, n_group=8,
        topk_group=3, routed_scaling_factor=4.0,
    ),
    "v3": V3 | dict(
        n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, routed_scaling_factor=2.5,
        num_nextn_predict_layers=1, num_hidden_layers=3,
    ),
    "k2": V3 | dict(
        n_routed_experts=12, num_experts_per_tok=3, n_group=1, topk_group=1, routed_scaling_factor=2.827,
        rope_theta=50000.0, max_position_embeddings=1024,
        rope_scaling=dict(type="yarn", factor=32.0, original_max_position_embeddings=32, beta_fast=1.0, beta_slow=1.0,
                          mscale=1.0, mscale_all_dim=1.0),
    ),
    "moonlight": V3 | dict(
        n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1, n_shared_experts=2,
        routed_scaling_factor=2.446, rope_theta=50000.0, rms_norm_eps=1e-5, max_position_embeddings=256,
        q_lora_rank=None, rope_scaling=None,
    ),
    "tied": V3 | dict(
        n_routed_experts=8, num_experts_per_tok=3, n_group=1, topk_group=1, routed_scaling_factor=1.5,
        rope_scaling=None, tie_word_embeddings=True,
    ),
}  # fmt: skip


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Outputs of order 1 from inputs of order 1, norms away from 1, biases of both signs; all exact in bfloat16."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if "inv_freq" in name:
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if "bias" in name:
            value = 0.6 * noise - 0.5
        elif tensor.ndim == 1:
            value = 1 + 0.3 * noise
        elif "embed" in name and not (hasattr(module, "config") and module.config.tie_word_embeddings):
            value = noise
        else:
            value = noise * (2.0 if "gate.weight" in name else 1.0) / tensor.shape[-1] ** 0.5
        tensor.data.copy_(value if "bias" in name else value.bfloat16().float())


def released_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused experts taken apart: `experts.gate_up_proj[E, 2F, D]` and `experts.down_proj[E, D, F]` to one each."""
    out = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".experts.")
        if not stem:
            out[name] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = {"gate_proj": expert.chunk(2)[0], "up_proj": expert.chunk(2)[1]}
            for part, value in parts.items() if last == "gate_up_proj" else [("down_proj", expert)]:
                out[f"{stem}.experts.{e}.{part}.weight"] = value
    return out


def mtp_names(mtp: MtpModel, layer: int) -> dict[str, torch.Tensor]:
    """The MTP module under its names in a released file, embedding and head repeated as there."""
    out = {}
    for name, tensor in released_names(mtp.state_dict()).items():
        if name in ("embed_tokens.weight", "shared_head.weight"):
            name = name.replace("shared_head", "shared_head.head")
        else:
            name = name.removeprefix("layers.0.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        out[f"model.layers.{layer}.{name}"] = tensor
    return out


def batches(config: dict, rng: np.random.Generator) -> dict[str, dict[str, np.ndarray]]:
    def tokens(*shape):
        return rng.integers(0, config["vocab_size"], shape).astype(np.int32)

    lengths = [9, 5, 12]
    pad = np.array([[t >= 12 - n for t in range(12)] for n in lengths]).astype(np.int32)
    packed_segments = np.array([[1] * 5 + [2] * 8 + [3] * 3, [1] * 10 + [2] * 4 + [0] * 2]).astype(np.int32)
    packed_positions = np.array([[*range(5), *range(8), *range(3)], [*range(10), *range(4), 0, 0]]).astype(np.int32)
    long = np.arange(128)[None].astype(np.int32)  # four times rope_scaling's original length
    out = {
        "plain": (tokens(2, 14), np.ones((2, 14), np.int32), np.tile(np.arange(14, dtype=np.int32), (2, 1))),
        "long": (tokens(1, 128), np.ones((1, 128), np.int32), long),
        "padded": (tokens(3, 12), pad, np.maximum(np.cumsum(pad, 1) - 1, 0).astype(np.int32)),
        "packed": (tokens(2, 16), packed_segments, packed_positions),
    }
    return {name: dict(zip(("tokens", "segments", "positions"), arrays, strict=True)) for name, arrays in out.items()}


def mask(kind: str, segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if kind != "packed":
        return (segments != 0).long()
    T = segments.shape[1]
    seen = torch.tril(torch.ones(T, T, dtype=torch.bool)) & (segments[:, :, None] == segments[:, None, :])
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def run(model, kind: str, batch: dict[str, np.ndarray]):
    """Logits, final hidden states, and the experts chosen in each expert layer, sorted."""
    chosen = []
    gates = [m for n, m in model.named_modules() if n.endswith("mlp.gate")]
    hooks = [g.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for g in gates]
    tokens, segments, positions = (torch.from_numpy(batch[k]).long() for k in ("tokens", "segments", "positions"))
    hidden = model.model(
        tokens, attention_mask=mask(kind, segments, model.dtype), position_ids=positions, use_cache=False
    ).last_hidden_state
    for hook in hooks:
        hook.remove()
    experts = [c.sort(dim=-1).values.reshape(*tokens.shape, -1) for c in chosen]
    return model.lm_head(hidden), hidden, torch.stack(experts).to(torch.int8).numpy()


def mtp_logits(model, mtp, hidden, batch):
    """Row i: from the final hidden state of token i and the embedding of token i + 1, logits of token i + 2."""
    tokens, positions = (torch.from_numpy(batch[k]).long() for k in ("tokens", "positions"))
    h = mtp.forward_layer(0, hidden[:, :-1], positions[:, :-1], None, input_ids=tokens[:, 1:])
    return model.lm_head(h)


def make(name: str, config: dict, seed: int) -> None:
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    auto = transformers.AutoConfig.from_pretrained(directory)
    auto._attn_implementation = auto._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(auto, dtype=torch.float32)
    randomise(model, generator)
    tensors, mtp = released_names(model.state_dict()), None
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]  # as save_pretrained does
    if config["num_nextn_predict_layers"]:
        mtp = MtpModel(model, 1)
        mtp.config._attn_implementation = mtp.config._experts_implementation = "eager"
        randomise(mtp.layers, generator)
        tensors |= mtp_names(mtp, config["num_hidden_layers"])
    stored = {k: (v if "bias" in k else v.bfloat16()).clone().contiguous() for k, v in tensors.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})

    # what is compared is what transformers reads back from the files
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    exact = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    if mtp:
        mtp.tie_with_main_model(model)
    expected = {}
    for kind, batch in batches(config, np.random.default_rng(seed)).items():
        with torch.no_grad():
            logits, hidden, experts = run(model, kind, batch)
            real = batch["segments"] != 0
            # (its float64 path wants the explicit mask where rows begin with padding)
            precise = run(exact, "packed" if kind == "padded" else kind, batch)[2]
            assert (experts == precise)[:, real].all(), f"{name} {kind}: choices hang on rounding"
            arrays = batch | {"logits": logits.numpy(), "experts": experts}
            if mtp and kind == "plain":
                arrays["mtp_logits"] = mtp_logits(model, mtp, hidden, batch).numpy()
        expected |= {f"{kind}/{key}": value for key, value in arrays.items()}
        print(f"{name:18}{kind:8}logits std {logits.std():.2f}, experts used {len(np.unique(experts))}")
    np.savez_compressed(directory / "expected.npz", **expected)
    if mtp or config["tie_word_embeddings"]:
        np.savez_compressed(directory / "gradients.npz", **gradients(model, mtp, config, seed))


def gradients(model, mtp, config: dict, seed: int) -> dict[str, np.ndarray]:
    batch = batches(config, np.random.default_rng(seed))["plain"]
    logits, hidden, _ = run(model, "plain", batch)
    tokens = torch.from_numpy(batch["tokens"]).long()

    def mean_nats(logits, ahead):
        return torch.nn.functional.cross_entropy(logits[:, : tokens.shape[1] - ahead].flatten(0, 1),
                                                 tokens[:, ahead:].flatten())  # fmt: skip

    loss = mean_nats(logits, 1)
    if mtp:
        loss += 0.3 * mean_nats(mtp_logits(model, mtp, hidden, batch), 2)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    mtp_grads = {n: p.grad for n, p in mtp.layers.named_parameters(prefix="layers")} if mtp else {}
    by_name = released_names(grads)
    for name, grad in released_names(mtp_grads).items():
        name = name.removeprefix("layers.0.").removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        by_name[f"model.layers.{config['num_hidden_layers']}.{name}"] = grad
    return {"loss": loss.detach().numpy()} | {n: g.numpy() for n, g in by_name.items()}


if __name__ == "__main__":
    assert transformers.__version__ == "5.23.0", "SPEC: the oracle is transformers 5.23.0"
    torch.set_num_threads(1)
    for number, (case, settings) in enumerate(CASES.items()):
        make(case, settings, seed=number)
        assert load_file(HERE / case / "model.safetensors")
