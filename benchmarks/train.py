"""Training throughput compared with `transformers` and with the processor's peak, and with more experts.

    python benchmarks/train.py [--torch PYTHON] [--dtype float32|bfloat16]

`--torch` is a Python with PyTorch and `transformers` 5.23.0 or 5.24.0, which trains the same shape eagerly with AdamW,
with the faster of two experts implementations (a third gathers weights for every token: 17 GB). Both alternate; medians
of five. 4,096 tokens per step in 8 sequences.
"""

import argparse
import dataclasses
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median
from typing import Literal

import jax
from flax import nnx
from model import CFG, stepper

from mla_moe import Transformer, save_pretrained
from mla_moe.nn.model_costs import count_parameters, train_flops_per_token
from mla_moe.parallel.accelerators import peak_flops

BATCH, LENGTH, RUNS = 8, 512, 5

PEER = """
import json, sys, time, torch, transformers
transformers.logging.set_verbosity_error()
assert transformers.__version__ in ("5.23.0", "5.24.0")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
tokens = torch.randint(0, model.config.vocab_size, (int(sys.argv[3]), int(sys.argv[4])))

def step():
    start = time.perf_counter()
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return time.perf_counter() - start

def trial(experts):
    model.set_experts_implementation(experts)
    return min(step() for _ in range(2))

experts = min(("grouped_mm", "eager"), key=trial)
model.set_experts_implementation(experts)
print(experts, flush=True)
for _ in sys.stdin:
    print(step(), flush=True)
"""


def compare_with_transformers(torch: str | None, dtype: Literal["float32", "bfloat16"]) -> None:
    tokens, flops, peak = BATCH * LENGTH, train_flops_per_token(CFG, LENGTH), peak_flops(jax.devices()[0])
    count = count_parameters(CFG)
    print(f"{count.total / 1e6:.1f} M parameters, {count.active / 1e6:.1f} M active; {flops / 1e6:.1f} MFLOPs a token")
    ours = stepper(CFG, dtype, BATCH, LENGTH)
    peer, experts = None, ""
    with tempfile.TemporaryDirectory() as folder:
        if torch:
            path = Path(folder) / "model"
            save_pretrained(Transformer(CFG, rngs=nnx.Rngs(0)), path)
            command = [torch, "-c", PEER, str(path), dtype, str(BATCH), str(LENGTH)]
            peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert peer.stdin is not None
            assert peer.stdout is not None
            experts = peer.stdout.readline().strip()
        seconds, theirs, peaks = [], [], []
        for _ in range(RUNS):
            seconds.append(min(ours() for _ in range(2)))
            peaks.append(peak_flops(jax.devices()[0]))
            if peer and peer.stdout:
                print(file=peer.stdin, flush=True)
                theirs.append(json.loads(peer.stdout.readline()))
        if peer and peer.stdin:
            peer.stdin.close()
            peer.wait()
    rate, peak = tokens / median(seconds), median(peaks)
    print(f"mla_moe, {dtype}: {rate:,.0f} tokens/s, {rate * flops / peak:.0%} of {peak / 1e9:.0f} GFLOP/s in float32")
    if torch:
        times = median(theirs) / median(seconds)
        print(f"transformers, {experts}: {tokens / median(theirs):,.0f} tokens/s; {times:.1f} times")


def with_more_experts(dtype: Literal["float32", "bfloat16"]) -> None:
    """More experts of the same width; tokens per step and active parameters stay the same. All sizes alternate."""
    sizes = (8, 32, 128)
    runs = {}
    for size in sizes:
        cfg = dataclasses.replace(CFG, n_routed_experts=size, n_group=1, topk_group=1)
        runs[size] = stepper(cfg, dtype, 16, 512)
    times = {size: [] for size in sizes}
    for _ in range(RUNS):
        for size, run in runs.items():
            times[size].append(run())
    print(f"\n{'experts, top-4, 8,192 tokens':30}{'s a step':>10}{'times 8':>10}")
    for size in sizes:
        print(f"{size:<30}{median(times[size]):10.2f}{median(times[size]) / median(times[sizes[0]]):10.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="a Python with PyTorch and transformers")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    compare_with_transformers(args.torch, args.dtype)
    with_more_experts(args.dtype)
