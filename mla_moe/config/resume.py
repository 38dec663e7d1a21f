"""Resume policy: which fields of a recipe may change between two starts of a run. It is metadata of each field."""

import dataclasses
from collections.abc import Mapping, Set
from typing import Any, Literal, NamedTuple

STAGES = ("pretrain", "sft", "dpo", "rl", "rejection")
"""The stages of a run, in the order in which they run. The model of a run is that of the last one."""

Resume = Literal["fixed", "free"] | tuple[str, ...]
"""`fixed`: a run keeps the value. `free`: it may change at any restart, because it changes how the run computes, logs
or saves, but not what. A tuple of stages: it may change until one of them, which alone use it, has started."""


def field(
    default: Any,
    *,
    resume: Resume | None = None,
    change: Literal["stated"] | None = None,
    stage: str | None = None,
    full_state: Literal["equal"] | None = None,
    init_from: Literal["may_differ"] | None = None,
) -> Any:
    """A dataclass field with a resume policy. What is None is as in the section around the field. `change="stated"`:
    while `stage` is the newest that has started, a resumed run may change the value if its recipe says so
    (`resume_changes`), because state and data position keep their meaning. `full_state="equal"`:
    with `init_parts = "full_state"`, pretraining resumes the optimizer and data position of another run, which must
    have the same value. `init_from="may_differ"`: the checkpoint that initializes a stage may have another value of
    this model field; all other model fields must be equal."""
    policy = {"resume": resume, "change": change, "stage": stage, "full_state": full_state, "init_from": init_from}
    return dataclasses.field(default=default, metadata={k: v for k, v in policy.items() if v is not None})


class Leaf(NamedTuple):
    """A field that is no section, with the policy that holds for it."""

    value: Any
    policy: Mapping[str, Any]

    def may_change(self, started_stages: Set[str]) -> bool:
        """Whether a run of which these stages have started may resume with another value."""
        resume: Resume = self.policy.get("resume", "fixed")
        return resume == "free" or (isinstance(resume, tuple) and not started_stages & set(resume))

    @property
    def may_be_stated(self) -> bool:
        """Whether `resume_changes` may name the field."""
        return self.policy.get("change") == "stated" and "stage" in self.policy

    def may_change_if_stated(self, started_stages: Set[str]) -> bool:
        """Whether a run of which these stages have started may resume with another value, if its recipe says so."""
        return self.may_be_stated and not started_stages & set(STAGES[STAGES.index(self.policy["stage"]) + 1 :])

    @property
    def equal_for_full_state(self) -> bool:
        """Whether another run must have this value for its full state to be restored: pretraining uses the field."""
        return self.policy.get("full_state") == "equal" and self.policy.get("resume", "fixed") == "fixed"


def leaves(config: Any, prefix: str = "", inherited: Mapping[str, Any] | None = None) -> dict[str, Leaf]:
    """The fields of a config and of its sections, by dotted name. A field's own policy overrides its section's."""
    found: dict[str, Leaf] = {}
    for f in dataclasses.fields(config):
        value, policy = getattr(config, f.name), {**(inherited or {}), **f.metadata}
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{f.name}.", policy)
        else:
            found[prefix + f.name] = Leaf(value, policy)
    return found
