"""What several processes restore from emergency checkpoints of which some are lost, each with a directory of its own as
if it were a host. `test_local_checkpoints.py` runs it."""

import dataclasses
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.checkpoint.files import CheckpointSaveError
from mla_moe.checkpoint.local_checkpoints import LocalCheckpoints
from mla_moe.config import CheckpointConfig, MeshConfig, Recipe
from mla_moe.parallel.mesh import make_mesh

SPECS = {"float32": P("fsdp"), "bfloat16": P(None, "fsdp"), "uint8": P(("fsdp", "tensor")), "bool": P(), "int32": P()}


class State(NamedTuple):
    params: dict[str, Any]
    frozen: Any = "not saved"


class Position:
    """Each process has one data stream, and takes the next one's when it resumes."""

    def __init__(self, step: int = 0):
        self.streams = {jax.process_index(): f"{jax.process_index()} at {step}"}

    def states(self) -> dict[int, str]:
        return self.streams

    def restore(self, read: Any) -> None:
        number = (jax.process_index() + 1) % jax.process_count()
        self.streams = {number: read(number)}


def values(dtype: str, step: int) -> np.ndarray:
    """Of any bits, such as -0 and NaN of all kinds."""
    random, width = np.random.default_rng(step), jnp.dtype(dtype).itemsize
    if dtype == "bool":
        return random.integers(0, 2, (4, 6)).astype(bool)
    x = random.integers(0, 1 << 8 * width, (4, 6), dtype=f"uint{8 * width}")
    x[1::2, ::2] = 1 << 8 * width - 1  # -0, of a float
    return x.view(jnp.dtype(dtype))


class Hosts:
    def __init__(self, folder: Path):
        self.folder, self.count = folder, jax.process_count()
        own = str(folder / "hosts" / str(jax.process_index()))
        checkpoint = CheckpointConfig(every=10, local_every=2, local_dir=own)
        self.recipe = Recipe(run_dir="run", mesh=MeshConfig(data=2, fsdp=-1), checkpoint=checkpoint)
        (folder / "run").mkdir(exist_ok=True)
        self.local = self.open(self.recipe)
        for step in (2, 4, 6):
            self.local.save(step, self.state(step), Position(step), None)
        self.local._wait()
        self.alone(lambda: shutil.copytree(folder / "hosts", folder / "kept"))

    def open(self, recipe: Recipe) -> LocalCheckpoints:
        return LocalCheckpoints(self.folder / "run", "pretrain", recipe, self.abstract(recipe.mesh))

    def abstract(self, sizes: MeshConfig) -> State:
        def array(dtype: str, spec: P) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((4, 6), jnp.dtype(dtype), sharding=NamedSharding(make_mesh(sizes), spec))

        return State({dtype: array(dtype, spec) for dtype, spec in SPECS.items()})

    def state(self, step: int) -> State:
        def array(dtype: str, like: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.make_array_from_callback((4, 6), like.sharding, lambda index: values(dtype, step)[index])

        return State({dtype: array(dtype, x) for dtype, x in self.abstract(self.recipe.mesh).params.items()})

    def alone(self, change: Any) -> None:
        """Have the first process alone change the hosts."""
        sync_global_devices("before a change")
        if jax.process_index() == 0:
            change()
        sync_global_devices("after a change")

    def undo(self) -> None:
        """Undo all changes."""

        def copy() -> None:
            shutil.rmtree(self.folder / "hosts", ignore_errors=True)
            shutil.copytree(self.folder / "kept", self.folder / "hosts")

        self.alone(copy)

    def copies(self, step: int) -> list[Path]:
        """The file of each host."""
        found = {path.parents[2].name: path for path in (self.folder / "hosts").glob(f"*/*/{step}/*")}
        return [found[str(process)] for process in range(self.count)]

    def restores(
        self, step: int | None, *logged: str, newer_than: int = 0, local: LocalCheckpoints | None = None
    ) -> None:
        """Require this step, bit for bit, and these lines."""
        log: list[str] = []
        local, abstract, position = local or self.local, self.abstract(self.recipe.mesh), Position()
        found = local.restore(abstract, position, newer_than, log.append)
        assert len(log) == len(logged), log
        assert all(part in line for part, line in zip(logged, log, strict=True)), log
        if step is None:
            assert found is None
            return
        state, number, base = found
        assert (state.frozen, number, base) == ("not saved", step, None)
        stream = (jax.process_index() + 1) % self.count
        assert position.streams == {stream: f"{stream} at {step}"}
        for dtype, x in state.params.items():
            assert (x.dtype, x.sharding) == (jnp.dtype(dtype), abstract.params[dtype].sharding)
            for shard in x.addressable_shards:
                assert np.asarray(shard.data).tobytes() == values(dtype, step)[shard.index].tobytes(), dtype


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def of_another_attempt(path: Path) -> None:
    """With another position in the data and other values, as if the run had come to this step in two ways."""
    damage(path)
    _, header, shards = path.read_bytes().split(b"\n", 2)
    rest = header.replace(b" at 6", b" at 5") + b"\n" + shards
    path.write_bytes(b"%08x\n" % zlib.crc32(rest) + rest)


def main(folder: Path) -> None:
    hosts = Hosts(folder)
    every, last = range(hosts.count), hosts.count - 1
    missing = [f"process {process}: has no emergency checkpoint of step 6" for process in every]
    hosts.restores(6)
    hosts.restores(None, newer_than=6)
    assert {path.name for path in hosts.local._directory.iterdir()} == {"4", "6"}

    def replace_host(process: int) -> None:
        shutil.rmtree(folder / "hosts" / str(process))

    hosts.alone(lambda: replace_host(0))
    hosts.restores(6, missing[0])

    hosts.undo()
    hosts.alone(lambda: damage(hosts.copies(6)[last]))
    hosts.restores(6, f"process {last}: the emergency checkpoint {hosts.copies(6)[last]} is damaged: does not match")

    def truncate_all() -> None:
        for path in hosts.copies(6):
            path.write_bytes(path.read_bytes()[:-9])

    hosts.undo()
    hosts.alone(truncate_all)
    damaged = [
        f"process {process}: the emergency checkpoint {hosts.copies(6)[process]} is damaged" for process in every
    ]
    hosts.restores(4, *damaged, "the emergency checkpoint of step 6 is not used: no host has params.")

    hosts.undo()
    hosts.alone(lambda: of_another_attempt(hosts.copies(6)[1]))
    hosts.restores(6, "process 1: the emergency checkpoint of step 6 is of another attempt than that of process 0")

    def renumber() -> None:
        """After a restart the first two hosts have each other's number; of four, the last one is new."""
        (zero, one), kept = hosts.copies(6)[:2], [path.read_bytes() for path in hosts.copies(6)]
        zero.unlink(), one.unlink()
        zero.with_name("1").write_bytes(kept[1])
        one.with_name("0").write_bytes(kept[0])
        if hosts.count == 4:
            replace_host(3)

    hosts.undo()
    hosts.alone(renumber)
    hosts.restores(6, *missing[3:])

    hosts.undo()
    other_mesh = dataclasses.replace(hosts.recipe, mesh=MeshConfig(data=4))
    with hosts.open(other_mesh) as local:
        for_step = [
            f"process {process}: the emergency checkpoint {hosts.copies(6)[process]} is of another" for process in every
        ]
        not_used = [
            line.replace("/6/", f"/{step}/") for step in (6, 4) for line in [*for_step, "the emergency checkpoint"]
        ]
        hosts.restores(None, *not_used, local=local)

    hosts.alone(lambda: shutil.rmtree(folder / "hosts"))
    hosts.restores(None)

    hosts.undo()
    with hosts.open(dataclasses.replace(hosts.recipe, seed=1)) as changed:
        others = [f"process {process}: emergency checkpoints of another run" for process in every]
        hosts.restores(None, *others, local=changed)

    hosts.undo()
    with hosts.open(hosts.recipe) as again:  # back to the first recipe, but another start than the first
        hosts.restores(None, *others, local=again)
        again.save(8, hosts.state(8), Position(8), None)
        again._wait()
        hosts.restores(8, *others, local=again)
        again.remove()
        hosts.restores(None, *others, local=again)
        again._directory.write_text("in the way")
        again.save(2, hosts.state(2), Position(2), None)
        with pytest.raises(
            CheckpointSaveError, match=r"could not be saved .*; checkpoint\.local_dir = None does without"
        ):
            again.save(4, hosts.state(4), Position(4), None)
