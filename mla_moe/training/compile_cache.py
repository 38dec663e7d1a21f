"""Keep compiled programs on disk, so that a second start of a run begins within seconds."""

import os
from pathlib import Path

import jax


def enable_compile_cache() -> None:
    """Use `JAX_COMPILATION_CACHE_DIR` if it is set, else `mla_moe/` in the user's cache directory."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "mla_moe" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
