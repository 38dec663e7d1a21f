"""How large the chunks of token dispatch are, and how many (`parallel.expert_parallel`)."""

import math
from typing import NamedTuple

from mla_moe.config import KernelConfig, MoEConfig
from mla_moe.config.parallelism import DispatchKernel, GroupedMatmulKernel
from mla_moe.ops.experts import Activation, find_activation
from mla_moe.ops.kernel_choice import target_platform
from mla_moe.parallel.mesh import physical_axes


def default_dispatch(platform: str | None = None) -> DispatchKernel:
    """`ragged` sends tokens only, `all_to_all` sends padded buffers: XLA:CPU has no `ragged_all_to_all` (jax issue
    34755)."""
    return "ragged" if (platform or target_platform()) in ("tpu", "gpu", "cuda") else "all_to_all"


PAIRS_PER_CHUNK, PAIRS_PER_CHUNK_GPU = 21_000, 50_000
"""About as many (token, expert) pairs of a device make a chunk of `ragged` dispatch: enough for whole matmul tiles of
each of DeepSeek-V3's experts, with buffers of a few GB. On a GPU more: every chunk reads the experts' weights and adds
to their gradients."""

PAIRS_PER_EXPERT = 1_600
"""On TPU at least as many for each expert of the device, for the same reason (docs/decisions/overlap.md)."""

MANY_EXPERTS = 13
"""With more on a device, the all-gathers of their weights take about as long as attention, and must run beside it."""


class DispatchPlan(NamedTuple):
    """Static sizes, fixed at compile time. A pair is a token with one of its experts."""

    num_experts: int
    devices: int
    """P, the size of the mesh axis."""
    max_local_experts: int
    """Most of a token's experts that one device can have."""
    chunk_capacity: int
    """Tokens that a device can send to another device in one chunk."""
    min_pairs: int
    """A token counts as at least so many pairs; a chunk is full at `min_pairs · chunk_capacity` of them."""
    num_chunks: int
    """Chunks of an even routing."""
    device_capacity: int | None
    """Tokens that a device can send to another in all chunks; the rest is dropped at capacity. None: dropless."""
    dispatch: DispatchKernel
    grouped_matmul: GroupedMatmulKernel | None
    activation: Activation
    pipelined: bool = False
    """Whether the exchange of one chunk runs beside the experts' products of another: not on GPU, where it blocks."""
    weights_before_routes: bool = False
    """Whether the all-gathers of the experts' weights must end before that of the router's choices begins."""
    axis: str = "expert"
    """The mesh axis of expert parallelism, by its name in the mesh."""

    @property
    def max_pairs(self) -> int:
        """Most pairs that a device can receive in one chunk."""
        return self.devices * (self.min_pairs * self.chunk_capacity + self.max_local_experts - self.min_pairs)


def dispatch_plan(cfg: MoEConfig, tokens: int, devices: int, kernels: KernelConfig) -> DispatchPlan:
    """Sizes for `tokens` tokens per device, such that a chunk's worst case is close to that of an even routing.

    A chunk of `ragged` dispatch is full when it has enough pairs for the experts, a chunk of `all_to_all` when its
    buffers are full of tokens, each of which may have `max_local_experts` pairs. `capacity_factor` times the tokens of
    an even routing is what a device can send to another device; None is dropless.
    """
    dispatch, capacity_factor = kernels.dispatch or default_dispatch(), kernels.capacity_factor
    gpu = target_platform() == "gpu"
    even_tokens = tokens * expected_device_fraction(cfg, devices)
    local_experts = cfg.num_experts // devices
    max_local_experts = min(cfg.num_experts_per_tok, local_experts)
    if dispatch == "ragged":
        pairs = tokens * cfg.num_experts_per_tok * cfg.num_experts / cfg.router_width
        min_pairs, slack, even_load = 1, 1.25, pairs / devices
        chunks = pairs / (PAIRS_PER_CHUNK_GPU if gpu else max(PAIRS_PER_CHUNK, local_experts * PAIRS_PER_EXPERT))
        # On TPU rather three small ones than one or two: the first dispatch and the last return are beside no experts.
        num_chunks = max(round(chunks), 1 if gpu else min(round(2 * chunks), 3), 1)
    else:
        # Three standard deviations of a random routing, so that it rarely takes one more chunk.
        min_pairs, slack, even_load = max_local_experts, min(1 + 3 / math.sqrt(max(even_tokens, 1)), 1.25), even_tokens
        worst_case = devices * expected_device_fraction(cfg, devices) * max_local_experts / cfg.num_experts_per_tok
        num_chunks = max(math.ceil(worst_case), 1)
    chunk_capacity = min(math.ceil(slack * even_load / num_chunks), tokens)
    device_capacity = None if capacity_factor is None else math.ceil(capacity_factor * even_tokens)
    return DispatchPlan(
        cfg.num_experts, devices, max_local_experts, chunk_capacity, min_pairs, num_chunks, device_capacity,
        dispatch, kernels.grouped_matmul, find_activation(cfg.hidden_act),
        dispatch == "ragged" and not gpu, local_experts > MANY_EXPERTS, *physical_axes("expert"),
    )  # fmt: skip


def expected_device_fraction(cfg: MoEConfig, devices: int) -> float:
    """The fraction of tokens that are sent to a given device, if all experts within the selected groups are equally
    likely. Times `devices` it is the mean number of devices per token: 5.3 of 8 for DeepSeek-V3 without groups, 3.6
    with its node-limited routing (4 of 8 groups; arXiv 2412.19437, section 2.1.2)."""
    E, K, G = cfg.num_experts, cfg.num_experts_per_tok, cfg.n_group
    topk_group, local_experts = cfg.topk_group, E // devices
    selectable, group_size = cfg.router_width // G * topk_group, E // G

    def any_selected(local_selectable: int) -> float:
        """The probability that at least one of these experts is among the K of all selectable ones."""
        return 1 - math.comb(selectable - local_selectable, K) / math.comb(selectable, K)

    if local_experts <= group_size:  # the device has a part of one group
        return topk_group / G * any_selected(local_experts)
    groups = local_experts // group_size
    counts = ((j, math.comb(groups, j) * math.comb(G - groups, topk_group - j)) for j in range(topk_group + 1))
    return sum(count * any_selected(j * group_size) for j, count in counts) / math.comb(G, topk_group)
