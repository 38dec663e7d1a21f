"""XLA options for programs that run a model, which `jax.jit` takes as `compiler_options`: for the training and RL
programs of this package, and for `jax.jit` in other code."""

import jax
from jax.sharding import Mesh

from mla_moe.config import KernelConfig, require

CompilerOptions = dict[str, bool | str]

_OVERLAP: CompilerOptions = {
    # By default every collective blocks its core. What these hide: docs/decisions/overlap.md.
    # The exchange of tokens between devices runs beside the experts.
    "xla_tpu_enable_async_ragged_all_to_all": True,
    # All-gathers of weights and reduce-scatters of gradients run on the SparseCores, which v5e lacks and ignores. The
    # dimensions are those of the torus that a mesh axis extends over.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    # Several at once, one SparseCore for an all-gather, and the scheduler may queue one behind the other.
    "xla_tpu_enable_concurrent_sparse_core_offloading": True,
    "xla_tpu_use_single_sparse_core_for_all_gather_offload": True,
    "xla_tpu_enable_sparse_core_offload_queuing_in_lhs": True,
    # By its own estimate the scheduler would wait for reduce-scatters too early.
    "xla_tpu_sparse_core_reduce_scatter_latency_multiplier": "4",
    # Of the next operations, the scheduler prefers what long chains of asynchronous ones wait for.
    "xla_lhs_prioritize_async_depth_over_stall": True,
}

_OPTIONS: dict[str, CompilerOptions] = {
    # By default XLA casts the weights of all layers to bfloat16 before the scan over them, and holds both copies;
    # without this propagation it casts a layer's weights when it uses them.
    "tpu": {"xla_jf_bf16_propagation": False} | _OVERLAP,
    # XLA's one-shot kernel for ragged all-to-alls, in which a device writes into the others' memory, and collectives
    # moved around it by the latency-hiding scheduler gave wrong gradients and NaN elsewhere (marin issues 8077 and
    # 8081, openxla/xla issue 47283). Without both, NCCL sends and receives, in the order of the program, within a host
    # and between hosts.
    "gpu": {
        "xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel": False,
        "xla_gpu_enable_latency_hiding_scheduler": False,
    },
    # Eigen in place of YNNPACK, whose batched matmuls, those of attention, are slower by a third.
    # Optimization barriers hold until the end. Jaxlib 0.10 removes them before it fuses operations, and computes the
    # cosine of a position, for example, again for each head (`ops.materialize`).
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "", "xla_disable_hlo_passes": "cse_barrier_expander"},
}


def compiler_options(platform: str | None = None, changes: tuple[str, ...] = ()) -> CompilerOptions:
    """The options for `jax.jit(f, compiler_options=…)` on a platform: `cpu`, `gpu` or `tpu`, by default that of
    `jax.default_backend()`. Raises `ConfigError` for another platform.

    On GPU they exclude two features of XLA that gave wrong gradients with expert parallelism: a program that dispatches
    tokens to experts of other GPUs must be compiled with them.

    `changes` are those of the recipe's `kernels.compiler_options`: `name=value` sets an option, `name=` removes it.

    On Linux CPUs a training step is also faster with arrays in huge pages, which a process cannot turn on once it runs:
    start it with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` in the environment, as `train.py` does for itself.
    """
    platform = platform or jax.default_backend()
    require(platform in _OPTIONS, "platform", platform, f"must be one of {', '.join(_OPTIONS)}")
    options = dict(_OPTIONS[platform])
    for name, _, value in (change.partition("=") for change in changes):
        options.pop(name, None)
        if value:
            options[name] = {"true": True, "false": False}.get(value, value)
    return options


def mesh_compiler_options(mesh: Mesh, kernels: KernelConfig) -> CompilerOptions:
    """The options for a program of this package on the devices of `mesh`, with the recipe's changes."""
    return compiler_options(mesh.devices.flat[0].platform, kernels.compiler_options)
