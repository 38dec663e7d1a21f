"""Plans of the quickstart: for TPUs that are not there, and for this machine."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe import ConfigError
from mla_moe.cli import main
from mla_moe.config import MeshConfig, load_recipe
from mla_moe.parallel.accelerators import CHIPS
from mla_moe.parallel.mesh import make_mesh
from mla_moe.plan.compiler import bytes_needed, compile_to_buffers, without_cache
from mla_moe.plan.plan import make_plan
from mla_moe.plan.program import Program
from mla_moe.plan.topology import open_topology

QUICKSTART = "configs/quickstart.py"


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("v9:1", "write v5e:4x4"),
        ("v5p", "give the shape"),
        ("h100:8", "HOSTSxGPUS|CUDA compiler: pip install"),
        ("cpu:1024", "xla_force_host_platform_device_count=1024"),
    ],
)
def test_an_unknown_topology_is_one_line_with_the_choices(name, fix, capsys):
    assert main(["plan", QUICKSTART, "--topology", name]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: topology = '{name}'")
    assert line.count("\n") == 1
    with pytest.raises(ConfigError, match=fix):
        open_topology(name)


def test_without_a_compiler_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mla_moe\[plan\]'"):
        open_topology("v5p:2x2x1")
    with pytest.raises(ConfigError, match=r"pip install 'mla_moe\[cuda\]'"):
        open_topology("h100:1x8")


def test_a_mesh_that_does_not_divide_the_topology():
    quickstart = load_recipe(QUICKSTART)
    quickstart = dataclasses.replace(quickstart, mesh=MeshConfig(data=3))
    with pytest.raises(ConfigError, match="number of devices, 8"):
        make_plan(quickstart, open_topology("cpu:8"))


def test_flags_change_the_recipe(capsys):
    assert main(["plan", QUICKSTART, "--topology", "cpu:8", "--mesh.data", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: mesh = 'data 3 x fsdp 1")
    with pytest.raises(SystemExit):
        main(["inspect", "tiny", "--mesh.data", "3"])
    assert "--mesh.data" in capsys.readouterr().err


def test_the_quickstart_on_a_small_pod(capsys):
    pytest.importorskip("libtpu")
    assert main(["plan", QUICKSTART, "--topology", "v5p:2x2x1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    assert plan["devices"] == 4
    assert plan["argument_bytes"] + plan["temp_bytes"] < 0.02 * plan["capacity_bytes"]
    assert 0.4 < plan["useful_flops_share"] < 1
    assert 0 < plan["mfu"] < plan["useful_flops_share"] + 1e-9
    assert plan["step_seconds"] == max(plan[f"{term}_seconds"] for term in ("compute", "memory", "network"))
    assert {c["axes"] for c in plan["collectives"]} == {"data"}

    assert main(["plan", QUICKSTART, "--topology", "v5p:2x2x1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("train on v5p:2x2x1: 4 devices, data 4")
    assert f"fits: {(plan['argument_bytes'] + plan['temp_bytes']) / 1e9:.2f} GB of 102.80 GB" in text
    assert f"{plan['mfu']:.1%}" in text
    assert "data, all-reduce" in text


def test_what_travels_between_slices_counts(capsys):
    """Gradients of data parallelism over two slices: scattered within one, added up between them, and gathered."""
    pytest.importorskip("libtpu")
    assert main(["plan", QUICKSTART, "--topology", "v5p:2x2x1", "--slices", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (between,) = [c for c in plan["collectives"] if c["axes"] == "data, between slices" and c["kind"] == "all-reduce"]
    assert between["seconds"] == pytest.approx(between["bytes"] / CHIPS["v5p"].network)
    gradients = plan["memory"]["gradients"] / 4  # of a slice's four devices; matrices' in bfloat16
    assert 0.5 * gradients < between["bytes"] < 1.1 * gradients


def test_the_program_is_what_the_compiler_makes_of_it():
    """Compiled as far as a plan needs and to its end. Of this program `memory_analysis` counts two gathered layers
    twice; its own peak is what it assigns."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), open_topology("v5p:2x2x1").devices)
    x = jax.ShapeDtypeStruct((1024, 2048), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    w = jax.ShapeDtypeStruct((8, 2048, 2048), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp")))

    @jax.jit
    def gradient(w, x):
        def layer(h, w):
            return jnp.tanh(h.astype(w.dtype) @ w).astype(h.dtype), None

        return jax.value_and_grad(lambda w: jax.lax.scan(layer, x, w)[0].sum())(w)

    traced = gradient.trace(w, x)
    assigned = compile_to_buffers(traced, "tpu")
    with without_cache():
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    analysed = compiled.memory_analysis()
    needed = assigned.arguments + assigned.temporaries
    assert assigned.arguments == analysed.argument_size_in_bytes
    assert needed == pytest.approx(analysed.peak_memory_in_bytes, rel=0.05)
    assert needed < sum(bytes_needed(compiled))
    whole, part = Program(compiled.as_text()), Program(assigned.text)
    assert whole.collectives()
    assert part.collectives() == whole.collectives()
    assert part.memory_traffic() == pytest.approx(whole.memory_traffic(), rel=1e-3)


def test_what_does_not_fit_is_refused_with_what_it_would_need(capsys):
    pytest.importorskip("libtpu")
    rows = ["--training.batch-size", "8192", "--training.gradient_accumulation_steps", "1"]
    assert main(["plan", QUICKSTART, "--topology", "v5e:2x2", *rows, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"]
    assert "RESOURCE_EXHAUSTED" in plan["refusal"]
    assert 17e9 < plan["argument_bytes"] + plan["temp_bytes"] < 500e9
    assert plan["step_seconds"] is None


def test_learning_from_rewards_on_a_small_pod(capsys):
    pytest.importorskip("libtpu")
    grpo = ["--rl.objective", "grpo", "--rl.kl_coef", "1e-3"]
    assert main(["plan", "configs/chain_sum.py", "--topology", "v5p:2x2x1", "--stage", "rl", *grpo, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    parameters = plan["memory"]["parameters"]
    assert plan["held"]["optimizer"] == pytest.approx(plan["held"]["reference"] * 2, rel=0.01)
    assert plan["held"]["reference"] == pytest.approx(parameters, rel=0.01)
    # Parameters in four bytes, those of the sampler in two, next to what is held.
    assert plan["sampling_bytes"] == pytest.approx(sum(plan["held"].values()) + 1.5 * parameters, rel=0.02)
    assert plan["argument_bytes"] == pytest.approx(2 * parameters + plan["memory"]["batch"], rel=0.05)
    assert 0.4 < plan["useful_flops_share"] < plan["useful_or_recomputed_flops_share"] < 1

    assert main(["plan", "configs/chain_sum.py", "--topology", "v5p:2x2x1", "--stage", "rl", *grpo]) == 0
    text = capsys.readouterr().out
    assert all(f"{kind}, beside it" in text for kind in plan["held"])
    assert "while sampling" in text


def test_a_recipe_without_rewards_has_no_such_stage(capsys):
    assert main(["plan", QUICKSTART, "--topology", "cpu", "--stage", "rl", "--rl.steps", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: rl.steps = 0")
