"""Emergency checkpoints: processes that are killed resume bit for bit from what their hosts still have."""

import dataclasses
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe import ConfigError
from mla_moe.checkpoint.local_checkpoints import LocalCheckpoints, _recipe_checksum
from mla_moe.config import (
    CheckpointConfig,
    MeshConfig,
    SFTConfig,
)
from mla_moe.parallel.mesh import make_mesh
from tests.forked_runs import Runs, of_processes, outcome, small_recipe
from tests.parallel.local_scenarios import State

STEPS, SHARED, LOCAL = 8, 4, 6
"""The last step, that of the checkpoint in the run's directory, and that of the newest local one."""


@pytest.fixture(scope="module")
def recipe(cfg, tmp_path_factory):
    fields = {"mesh": MeshConfig(data=2, fsdp=-1), "checkpoint": CheckpointConfig(every=SHARED)}
    return small_recipe(cfg, tmp_path_factory.mktemp("text"), STEPS, **fields)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = Runs(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


KILL = f"""
from jax.experimental.multihost_utils import sync_global_devices
from mla_moe.checkpoint.local_checkpoints import LocalCheckpoints
from mla_moe.checkpoint.manager import CheckpointManager
save_locally, save = LocalCheckpoints.save, CheckpointManager.save
def save_and_wait(self, *state):
    save(self, *state)
    self.wait_until_saved()
def save_locally_and_end(self, step, *state):
    save_locally(self, step, *state)
    if step == {LOCAL}:
        self.__exit__()
        sync_global_devices("all copies are written")
        os.kill(os.getpid(), signal.SIGKILL)
CheckpointManager.save, LocalCheckpoints.save = save_and_wait, save_locally_and_end
"""


class Hosts:
    """Processes of one device, each with a directory of its own, as if it were a host."""

    def __init__(self, recipe, runs, folder, count):
        self.recipe, self.runs, self.folder, self.count = recipe, runs, folder, count

    def train(self, patch="", flags=("--checkpoint.local-every=2",)):
        """Train. Returns the exit codes and the output."""
        local = [f"--checkpoint.local-dir={self.folder / str(process)}" for process in range(self.count)]
        commands = [
            [*own, *flags, *([folder] if flags else [])]
            for own, folder in zip(of_processes(self.count), local, strict=True)
        ]
        self.runs.start(self.recipe, self.folder / "run", *commands, patch=patch)
        return self.runs.wait()

    def finish(self, **options):
        """Train to the end. Returns the output."""
        codes, output = self.train(**options)
        assert codes == [0] * self.count, output
        return output


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.thorough)])
def expected(request, recipe, runs, tmp_path_factory):
    """A number of processes, and the outcome of their run without a fault and without emergency checkpoints."""
    hosts = Hosts(recipe, runs, tmp_path_factory.mktemp("whole"), request.param)
    hosts.finish(flags=())
    return hosts.count, outcome(hosts.folder / "run", STEPS)


@pytest.fixture(scope="module")
def killed(expected, recipe, runs, tmp_path_factory):
    """The hosts after all processes were killed."""
    hosts = Hosts(recipe, runs, tmp_path_factory.mktemp("killed") / "hosts", expected[0])
    hosts.folder.mkdir()
    codes, output = hosts.train(patch=KILL)
    # JAX aborts a process that is not killed yet when it finds the first one gone.
    assert set(codes) <= {-signal.SIGKILL, -signal.SIGABRT}, output
    shutil.copytree(hosts.folder, hosts.folder.with_name("kept"))
    return hosts


@pytest.fixture
def hosts(killed):
    """The same again for each test, in the same folder, by which a run knows its copies."""
    shutil.rmtree(killed.folder)
    shutil.copytree(killed.folder.with_name("kept"), killed.folder)
    return killed


@pytest.mark.slow
def test_a_host_that_was_replaced_receives_its_shards_from_a_replica(hosts, expected):
    shutil.rmtree(hosts.folder / "0")
    output = hosts.finish()
    assert f"process 0: has no emergency checkpoint of step {LOCAL}" in output
    assert f"resumed from the emergency checkpoint of step {LOCAL}" in output
    assert outcome(hosts.folder / "run", STEPS) == expected[1]
    left = [path for process in range(hosts.count) for path in (hosts.folder / str(process)).iterdir()]
    assert left == [], "the last step is in the run's directory"


@pytest.mark.slow
def test_without_copies_of_its_own_a_run_resumes_from_the_checkpoint_in_its_directory(hosts, expected):
    for process in range(hosts.count):
        (copies,) = (hosts.folder / str(process)).iterdir()
        copies.rename(copies.with_name("0123456789abcdef"))
    output = hosts.finish()
    for process in range(hosts.count):
        assert f"process {process}: emergency checkpoints of another run, stage or recipe are not used" in output
    assert f"resumed from the checkpoint of step {SHARED}" in output
    assert outcome(hosts.folder / "run", STEPS) == expected[1]


SCENARIOS = """
import jax
from pathlib import Path
from mla_moe.parallel.distributed import initialize
from tests.parallel.local_scenarios import main as restore_all
jax.config.update("jax_num_cpu_devices", {devices})
initialize(arguments[1:])
restore_all(Path({folder!r}))
sys.exit()
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_what_is_left_on_the_hosts_is_restored_bit_for_bit(count, recipe, runs, tmp_path):
    patch = SCENARIOS.format(folder=str(tmp_path), devices=4 // count)
    runs.start(recipe, tmp_path / "run", *of_processes(count), patch=patch)
    codes, output = runs.wait()
    assert codes == [0] * count, output


def test_copies_are_those_of_a_run_its_stage_its_recipe_and_the_step_to_which_it_went_back(recipe, tmp_path):
    def checksum(stage="pretrain", run_dir=tmp_path, **changes):
        return _recipe_checksum(dataclasses.replace(recipe, **changes), run_dir, stage)

    before, longer = checksum(), dataclasses.replace(recipe.training, steps=9)
    assert (
        checksum(mesh=MeshConfig(data=4), checkpoint=CheckpointConfig(every=7), sft=SFTConfig(batch_size=8)) == before
    )
    others = checksum("sft"), checksum(run_dir=tmp_path / "copy"), checksum(seed=1), checksum(training=longer)
    assert before not in others
    (tmp_path / "resume_step.json").write_text('{"step": 4}')
    assert checksum() not in (before, *others)


@pytest.mark.parametrize("sizes", [MeshConfig(data=2, fsdp=4), MeshConfig(data=1, fsdp=8)])
def test_a_run_without_a_replica_in_another_process_is_refused(sizes, recipe, tmp_path):
    checkpoint = CheckpointConfig(local_dir=str(tmp_path), local_every=2)
    sharded = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(make_mesh(sizes), P("fsdp")))
    with pytest.raises(
        ConfigError, match=r"no other process has a replica of params\.x float32\[0:.*set mesh\.data"
    ) as error:
        LocalCheckpoints(
            tmp_path, "pretrain", dataclasses.replace(recipe, checkpoint=checkpoint), State({"x": sharded})
        )
    assert error.value.field == "checkpoint.local_dir"


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("local_dir", {"local_dir": "s3://bucket/local", "local_every": 2}, "is a URL"),
        ("local_dir", {"local_dir": "", "local_every": 2}, "name a directory"),
        ("local_every", {"local_dir": "/local"}, "set both"),
        ("local_every", {"local_every": 2}, "set both"),
        ("local_every", {"local_dir": "/local", "local_every": 100}, "fewer than checkpoint.every = 100"),
        ("local_every", {"local_dir": "/local", "local_every": 0}, "must be at least 1 and"),
    ],
)
def test_wrong_settings_are_refused(field, values, message):
    with pytest.raises(ConfigError, match=message) as error:
        CheckpointConfig(**values)
    assert error.value.field == f"checkpoint.{field}"
