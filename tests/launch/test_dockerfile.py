"""The Dockerfile: its stages, the extras that they install, and that what they copy is there and not ignored. Nothing
here builds it, which needs a daemon."""

import re
import tomllib

import pytest


@pytest.fixture
def stages(pytestconfig):
    """By name: the stage that it begins with, and its instructions with continued lines joined."""
    text = (pytestconfig.rootpath / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    found = {}
    for instruction, arguments in lines:
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()
            found[name] = (base, [])
        else:
            found[name][1].append((instruction, arguments))
    return found


def test_each_device_has_a_stage(stages):
    assert {"cpu", "tpu", "cuda"} <= set(stages)
    assert list(stages)[-1] == "cpu", "the default of `docker build`"
    for name in ("cpu", "tpu", "cuda"):
        base, ((copy, arguments),) = stages[name]
        source = re.fullmatch(r"--from=(\S+) /opt/venv /opt/venv", arguments)[1]
        assert (base, copy) == ("runtime", "COPY")
        assert source == "build" if name == "cpu" else (stages[source][0], source) == ("build", f"build-{name}")


def test_extras_exist(stages, pytestconfig):
    extras = tomllib.loads((pytestconfig.rootpath / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (given,) = (arguments for _, found in stages.values() for name, arguments in found if name == "ARG")
    installed = [arguments for _, found in stages.values() for name, arguments in found if "pip install" in arguments]
    assert [re.search(r'"\.\[(\S+)\]"', line)[1] for line in installed] == ["$EXTRAS", "tpu", "cuda"]
    assert {"tpu", "cuda", *given.removeprefix("EXTRAS=").split(",")} <= set(extras)


def test_what_is_copied_is_there(stages, pytestconfig):
    allowed = {line[1:] for line in (pytestconfig.rootpath / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = [
        a.split()[:-1] for _, found in stages.values() for name, a in found if name == "COPY" and "--from" not in a
    ]
    names = {name for sources in copied for name in sources}
    assert names == allowed
    assert all((pytestconfig.rootpath / name).exists() for name in names)
