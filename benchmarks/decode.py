"""Decoding: bytes of the KV cache, tokens/s compared with `transformers`, and the time of a step as the context grows.

    python benchmarks/decode.py [--torch PYTHON]

`--torch` is a Python with PyTorch and `transformers == 5.23.0`; it generates from the same files and prompts, with the
fastest of its experts implementations, on one thread or all. The model is V3-shaped with 18.6 M parameters in bfloat16,
like released checkpoints; both compute in float32 and decode greedily. Prefill is included; best of three runs.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import CFG

from mla_moe import Precision, Transformer, preset, save_pretrained
from mla_moe.config import PRESETS
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.nn.model_costs import count_parameters, kv_cache_bytes_per_token

PROMPT, NEW = 64, 128

PEER = """
import json, sys, time, torch, transformers
transformers.logging.set_verbosity_error()
assert transformers.__version__ == "5.23.0"
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model.generation_config.eos_token_id = None
request = json.load(sys.stdin)
tokens = torch.tensor(request["prompts"])

def run(new):
    start = time.perf_counter()
    out = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False,
                         pad_token_id=0)
    return time.perf_counter() - start, out

def configure(setting):
    torch.set_num_threads(setting[0])
    model.set_experts_implementation(setting[1])

def trial(setting):
    configure(setting)
    return min(run(8)[0] for _ in range(2))

settings = [(threads, experts) for threads in (1, torch.get_num_threads()) for experts in ("grouped_mm", "batched_mm")]
setting = min(settings, key=trial)
configure(setting)
seconds, out = min((run(request["new"]) for _ in range(3)), key=lambda pair: pair[0])
description = f"{setting[1]}, {setting[0]} threads"
print(json.dumps({"seconds": seconds, "setting": description, "new": out[:, tokens.shape[1]:].tolist()}))
"""


def cache_table() -> None:
    """Compared with attention of the same width: as many heads of the values' width, keys and values in bfloat16."""
    print(f"{'cache bytes a token, bf16':26}{'latent':>10}{'MQA':>10}{'GQA, 8':>10}{'MHA':>12}{'MHA / latent':>14}")
    for name in PRESETS:
        cfg = preset(name)
        one = 2 * cfg.v_head_dim * cfg.num_hidden_layers * 2
        latent, heads = kv_cache_bytes_per_token(cfg), cfg.num_attention_heads
        gqa = one * min(8, heads)
        print(f"{name:26}{latent:10,}{one:10,}{gqa:10,}{one * heads:12,}{one * heads / latent:14.1f}")


def seconds_to_generate(
    model: Transformer, engine: Engine, prompts: list[list[int]], new: int
) -> tuple[float, list[list[int]]]:
    best, out = float("inf"), []
    for _ in range(4):  # the first compiles
        engine.load_weights(model)  # clears the prefix cache: every prompt is prefilled again
        completions = [engine.submit(Request(prompt, new)) for prompt in prompts]
        start = time.perf_counter()
        while engine.has_unfinished_requests:
            engine.step()
        best, out = min(best, time.perf_counter() - start), [c.tokens for c in completions]
    return best, out


def speed_table(model: Transformer, torch: str | None) -> None:
    rng = np.random.default_rng(0)
    print(f"\n{'float32, ' + str(NEW) + ' new tokens':26}{'tokens/s':>10}{'transformers':>14}{'times':>8}  same tokens")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        save_pretrained(model, path)
        for batch in (1, 8):
            prompts = rng.integers(0, CFG.vocab_size, (batch, PROMPT)).tolist()
            seconds, new = seconds_to_generate(
                model, Engine(model, max_num_seqs=batch, max_model_len=PROMPT + NEW), prompts, NEW
            )
            row = f"{'batch ' + str(batch):26}{batch * NEW / seconds:10.0f}"
            if torch:
                request = json.dumps({"prompts": prompts, "new": NEW})
                run = subprocess.run(
                    [torch, "-c", PEER, str(path)], input=request, check=True, capture_output=True, text=True
                )
                peer = json.loads(run.stdout.splitlines()[-1])
                same = np.mean(np.array(peer["new"]) == np.array(new))
                row += f"{batch * NEW / peer['seconds']:14.0f}{peer['seconds'] / seconds:8.1f}  {same:.1%}"
                row += f" ({peer['setting']})"
            print(row, flush=True)


def growth_table(model: Transformer) -> None:
    """Milliseconds per step while the context grows by 64 tokens from the given length."""
    rng = np.random.default_rng(1)
    print(f"\n{'context, tokens':26}" + "".join(f"{n:>10,}" for n in (128, 512, 1024, 2048)) + f"{'2,048 / 128':>14}")
    for batch in (1, 8):
        engine, times = Engine(model, max_num_seqs=batch, max_model_len=2304), []
        for context in (128, 512, 1024, 2048):
            best = float("inf")
            for _ in range(3):
                prompts = rng.integers(0, CFG.vocab_size, (batch, context)).tolist()
                completions = [engine.submit(Request(prompt, 81)) for prompt in prompts]
                while not all(c.tokens for c in completions):
                    engine.step()
                before = len(completions[0].tokens)
                start = time.perf_counter()
                while engine.has_unfinished_requests:
                    engine.step()
                best = min(best, (time.perf_counter() - start) / (81 - before))
            times.append(best * 1e3)
        row = "".join(f"{t:10.2f}" for t in times)
        print(f"{'ms a step, batch ' + str(batch):26}{row}{times[-1] / times[0]:14.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python with PyTorch and transformers")
    args = parser.parse_args()
    cache_table()
    print(
        f"\n{count_parameters(CFG).total / 1e6:.1f} M parameters on {jax.device_count()} {jax.default_backend()} device"
    )
    model = Transformer(CFG, rngs=nnx.Rngs(0), precision=Precision(param=jnp.bfloat16, compute=jnp.float32))
    speed_table(model, args.torch)
    growth_table(model)
