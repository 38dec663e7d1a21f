"""Eight virtual devices, and shapes checked at run time on every call of `ops`, `parallel`, `nn` and `rl`."""

import dataclasses
import gc
import importlib.metadata
import os
import signal
from pathlib import Path

# The tests compile many small programs and run each once or twice: compile fast, not for speed. The older emitters of
# XLA for CPU, which jaxlib has up to 0.10, compile a program in half the time.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib") < "0.11" else ""
)
# On a busy machine one of the virtual devices may come to a collective later than the 40 s after which XLA aborts.
os.environ["XLA_FLAGS"] += " --xla_cpu_collective_call_terminate_timeout_seconds=900"

# With the TPU compiler installed, JAX would look for a TPU. Several workers may load the compiler at a time.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import hypothesis
import jax
import jaxtyping
import pytest

jaxtyping.install_import_hook(("mla_moe.ops", "mla_moe.parallel", "mla_moe.nn", "mla_moe.rl"), "beartype.beartype")

jax.config.update("jax_num_cpu_devices", 8)


# No deadline for an example on a busy machine; the short form draws the same examples in every run.
hypothesis.settings.register_profile("short", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.register_profile("thorough", max_examples=10_000, deadline=None)


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="10,000 invalid inputs of each kind, and more faults")


def pytest_configure(config):
    hypothesis.settings.load_profile("thorough" if config.getoption("--thorough") else "short")


def pytest_xdist_auto_num_workers(config):
    """A single file runs in this process: starting workers would take longer than most files."""
    return 0 if len(config.args) == 1 and Path(config.args[0].partition("::")[0]).is_file() else None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--thorough"):
        items[:] = [item for item in items if "thorough" not in item.keywords]


@pytest.fixture(scope="session")
def thorough(pytestconfig):
    return pytestconfig.getoption("--thorough")


@pytest.fixture(autouse=True)
def _strict_types(request):
    """Strict dtype promotion in the tests of `ops`, `nn` and the modules of `parallel`. (Optax does not pass it.)"""
    parallel = request.path.stem in ("test_expert_parallel", "test_sharded_einsum")
    strict = request.path.parent.name in ("ops", "nn") or parallel
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _compile_cache(tmp_path_factory):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.getbasetemp().parent / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Compiled programs of earlier modules would make a worker grow to 4 GB; the cache on disk keeps them."""
    yield
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident > 1.2e9:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def interruptible():
    """This process and its children may have inherited SIGINT as ignored, from a shell in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def cfg():
    """A model that compiles in seconds and has every feature: expert groups, both latents, YaRN, an MTP module."""
    from mla_moe import ModelConfig, Yarn

    return ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=24,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        max_position_embeddings=128,
        rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=32),
        initializer_range=0.1,
        num_nextn_predict_layers=1,
    )


@pytest.fixture(scope="session")
def dsa_cfg(cfg):
    """With DeepSeek Sparse Attention: the dense layer has an indexer, and of those with experts the second."""
    types = "full", "shared", "full", "shared"
    index = {"index_topk": 6, "index_n_heads": 7, "index_head_dim": 10, "indexer_types": types}
    base = dataclasses.replace(cfg, num_hidden_layers=4, num_nextn_predict_layers=0)
    return dataclasses.replace(base, model_type="glm_moe_dsa", **index)


@pytest.fixture(scope="session")
def v2_cfg(cfg):
    """The same shape with the softmax router of V2 and without a query latent."""
    return dataclasses.replace(
        cfg,
        q_lora_rank=None,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        num_nextn_predict_layers=0,
    )
