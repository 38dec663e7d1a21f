"""Emergency checkpoints: copies of the state on the hosts' own disks or RAM disks, `LOCAL_DIR/ID/STEP/PROCESS`.

Each process writes the shards of its devices, as they are. Where every shard is left on some host, a run resumes from
there: hosts that lack theirs receive them from a replica. Why not by Orbax: docs/decisions/emergency-checkpoints.md.

`ID` is that of the run's `local_checkpoints.json`. Another one is drawn for each stage, when the run is rewound to an
earlier step, and when its recipe changes, so that what a host still has of before is never taken for newer.
"""

import contextlib
import hashlib
import json
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from mla_moe.checkpoint.base_reference import BaseReference
from mla_moe.checkpoint.bucket_run import location, synchronize
from mla_moe.checkpoint.data_position import DataPosition
from mla_moe.checkpoint.manager import State, saved_arrays
from mla_moe.checkpoint.orbax_checkpoint import array_checksums, config_checksum
from mla_moe.checkpoint.save_errors import as_save_error
from mla_moe.checkpoint.shard_layout import ShardLayout, copy_to_host
from mla_moe.config import ConfigError, Recipe
from mla_moe.config.files import read_json_object
from mla_moe.config.resume import STAGES, leaves

_FILE = "local_checkpoints.json"
_ID = re.compile("[0-9a-f]{16}")


class _Copy(NamedTuple):
    """The file of one process, or why there is none."""

    common: str = ""
    """What all processes write of a step: checksums of the arrays, position in the data and base, as JSON."""
    process: int = -1
    """Which one has written it: after a restart this host's process may have another number."""
    shards: Mapping[str, np.ndarray] = {}
    """The bytes of each shard."""
    problem: str = ""


class LocalCheckpoints(contextlib.AbstractContextManager["LocalCheckpoints"]):
    """Saves and restores copies of a stage's state. All processes call each method at the same point of the run."""

    def __init__(self, run_dir: Path, stage: str, recipe: Recipe, abstract: NamedTuple):
        """`abstract` has shapes, dtypes and shardings of the state. Raises `ConfigError` where no other process has a
        replica of each shard, and for a directory that cannot be created."""
        self._run_dir, self._local_dir = run_dir, Path(recipe.checkpoint.local_dir or "").absolute()
        self._every = recipe.checkpoint.local_every or 1
        self._layout = ShardLayout(saved_arrays(abstract))
        if key := self._layout.alone():
            size = f"with {jax.process_count()} processes and mesh.data = {self._layout.mesh.shape['data']}"
            fix = "set mesh.data to 2 or more, over several processes, or checkpoint.local_dir = None"
            problem = f"{size} no other process has a replica of {key}"
            raise ConfigError("checkpoint.local_dir", recipe.checkpoint.local_dir, f"{problem}; {fix}")
        self._recipe_checksum = _recipe_checksum(recipe, run_dir, stage)
        self._pool = ThreadPoolExecutor(1, "emergency checkpoint")
        self._pending: Future[None] | None = None
        self._newest: int | None = None
        """The step that is being written, was written last or was restored."""
        try:
            self._local_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = f"cannot be created: {error.strerror}; name a directory that every host can write"
            raise ConfigError("checkpoint.local_dir", recipe.checkpoint.local_dir, fix) from None
        self._open(renew=False)

    def __exit__(self, *error: Any) -> None:
        with self._as_save_error():
            try:
                self._wait()
            finally:
                self._pool.shutdown()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        return step % self._every == 0

    def save(self, step: int, state: NamedTuple, position: DataPosition, base: BaseReference | None) -> None:
        """Start to write: returns when the shards are copied to the host. Raises `CheckpointSaveError` if this process
        could not write the copy before."""
        with self._as_save_error():
            self._wait()
            tree = saved_arrays(state)
            shards = copy_to_host(tree)
            streams = {
                number: stream for there in _allgather(dict(position.states())) for number, stream in there.items()
            }
            # All processes have finished the previous copy, so older ones can go. Another process of this host may
            # write this step already.
            for folder in self._directory.glob("*"):
                if folder.name not in (str(self._newest), str(step)):
                    shutil.rmtree(folder, ignore_errors=True)
            checksums = array_checksums(tree)
            common = {"checksums": checksums, "position": streams, "base": base and base._asdict()}
            self._newest = step
            self._pending = self._pool.submit(self._write, step, json.dumps(common, sort_keys=True), shards)

    def restore(
        self, abstract: State, position: DataPosition, newer_than: int, log: Callable[[str], None]
    ) -> tuple[State, int, BaseReference | None] | None:
        """The newest state after step `newer_than` of which every shard is left, bit for bit, its step and base; moves
        `position`. None if there is none. What cannot be used is logged. Frozen parameters stay abstract."""
        found = _allgather({"steps": self._steps(), "others": self._others()})
        for process, there in enumerate(found):
            if there["others"]:
                fix = "of another run, stage or recipe are not used; remove them if no run needs them"
                log(f"process {process}: emergency checkpoints {fix}: {', '.join(there['others'])}")
        for step in sorted({step for there in found for step in there["steps"] if step > newer_than}, reverse=True):
            copy = self._read(step)
            digest = hashlib.sha256(copy.common.encode()).hexdigest()
            reports = _allgather([digest, copy.process, copy.problem])
            source = next((i for i, (_, writer, _) in enumerate(reports) if writer >= 0), 0)
            for process, (other, writer, problem) in enumerate(reports):
                if writer >= 0 and other != reports[source][0]:
                    problem = (
                        f"the emergency checkpoint of step {step} is of another attempt than that of process {source}"
                    )
                if problem:
                    log(f"process {process}: {problem}")
            writers = [writer if other == reports[source][0] else -1 for other, writer, _ in reports]
            if lost := self._layout.lost(writers):
                log(f"the emergency checkpoint of step {step} is not used: no host has {lost}")
                continue
            common, tree = json.loads(_broadcast(copy.common, source)), self._layout.assemble(writers, copy.shards)
            if array_checksums(tree) != common["checksums"]:
                log(f"the emergency checkpoint of step {step} is not used: its arrays do not match their checksums")
                continue
            position.restore(lambda number, streams=common["position"]: streams[str(number)])
            self._newest = step
            return abstract._replace(**tree), step, common["base"] and BaseReference(**common["base"])
        return None

    def remove(self) -> None:
        """Remove all copies: the run is rewound to an earlier step, or the stage has ended."""
        with self._as_save_error():
            self._wait()
        multihost_utils.sync_global_devices("emergency checkpoints")
        shutil.rmtree(self._directory, ignore_errors=True)
        self._open(renew=True)

    def _open(self, *, renew: bool) -> None:
        """Find the run's `ID`, or draw another."""
        path = self._run_dir / _FILE
        if jax.process_index() == 0:
            stored = read_json_object(path, "run_dir") if path.exists() else {}
            same = stored.get("recipe") == self._recipe_checksum and _ID.fullmatch(str(stored.get("id")))
            if renew or not same:
                stored = {"id": secrets.token_hex(8), "recipe": self._recipe_checksum}
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps(stored) + "\n")
                temporary.replace(path)
        synchronize(self._run_dir, _FILE)
        self._directory = self._local_dir / read_json_object(path, "run_dir")["id"]
        self._newest = None

    def _write(self, step: int, common: str, shards: Mapping[str, np.ndarray]) -> None:
        """A line with the checksum of the rest, a line with the header as JSON, and the shards' bytes. Not flushed to
        the disk: what a power failure leaves does not match its checksum."""
        header = {"common": common, "shards": {key: shard.nbytes for key, shard in shards.items()}}
        parts: list[Any] = [json.dumps(header).encode() + b"\n"]
        parts += [shard.reshape(-1).view(np.uint8) for shard in shards.values()]
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        folder, name = self._directory / str(step), str(jax.process_index())
        folder.mkdir(parents=True, exist_ok=True)
        with (temporary := folder / f".{name}").open("wb") as file:
            file.write(b"%08x\n" % checksum)
            for part in parts:
                file.write(part)
        temporary.replace(folder / name)

    def _read(self, step: int) -> _Copy:
        """The copy that this process wrote, or else another copy on this host."""
        own, folder = str(jax.process_index()), self._directory / str(step)
        problem = f"has no emergency checkpoint of step {step} in {self._directory}"
        problem += "; its shards are taken from a replica, if there is one"
        paths = (path for path in folder.glob("*") if path.name.isdecimal())
        for path in sorted(paths, key=lambda path: path.name != own):
            try:
                with path.open("rb") as file:
                    checksum, line = int(file.readline(), 16), file.readline()
                    data = np.fromfile(file, np.uint8)
                if checksum != zlib.crc32(data.data, zlib.crc32(line)):
                    raise ValueError("does not match its checksum")
            except (OSError, ValueError) as error:
                problem = f"the emergency checkpoint {path} is damaged: {error}"
                continue
            header = json.loads(line)
            if header["shards"].keys() != self._layout.keys_at({int(path.name)}):
                problem = f"the emergency checkpoint {path} is of another mesh or number of processes"
                continue
            ends = np.cumsum(list(header["shards"].values()))
            shards = dict(zip(header["shards"], np.split(data, ends[:-1]), strict=True))
            return _Copy(header["common"], int(path.name), shards)
        return _Copy(problem=problem)

    def _steps(self) -> list[int]:
        return [int(path.name) for path in self._directory.glob("*") if path.name.isdecimal()]

    def _others(self) -> list[str]:
        """Directories of copies of other runs, or of this one before it was rewound or its recipe changed."""
        found = (path for path in self._local_dir.glob("*") if _ID.fullmatch(path.name) and path != self._directory)
        return [str(path) for path in found]

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _as_save_error(self) -> contextlib.AbstractContextManager[None]:
        return as_save_error(self._local_dir, "the same command resumes; checkpoint.local_dir = None does without")


def _recipe_checksum(recipe: Recipe, run_dir: Path, stage: str) -> int:
    """Checksum of what a copy depends on: the fields that the stage's state or numbers depend on, where the run is, and
    whether it was rewound to an earlier step."""
    started = set(STAGES[: STAGES.index(stage) + 1])
    fields = {name: leaf.value for name, leaf in leaves(recipe).items() if not leaf.may_change(started)}
    back = run_dir / "resume_step.json"
    rewound = back.read_text() if back.exists() else ""
    return config_checksum({"stage": stage, "run_dir": location(run_dir.absolute()), "rewound": rewound, **fields})


def _allgather(value: Any) -> list[Any]:
    """The values of all processes, each of which can be written as JSON."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    width = 1 << int(sizes.max()).bit_length()  # few widths: each is compiled
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def _broadcast(text: str, source: int) -> str:
    """The text of the process `source`, in all."""
    data, is_source = np.frombuffer(text.encode(), np.uint8), jax.process_index() == source
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size), is_source))
    data = data if is_source else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(data, is_source)).decode()
