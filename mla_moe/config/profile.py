"""Profiles: which steps of a run are traced, and whether its programs are written."""

import dataclasses
import re

from mla_moe.config.errors import MAX_SIZE, require_field


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Traces and programs of the training steps, in `profile/STAGE` of the run's directory."""

    steps: str | None = None
    """FIRST:LAST, such as 10:13: the steps to trace for XProf, both included, in each stage. The first step of a start
    also compiles. Only the first process writes a trace, of its own devices."""
    hlo: bool = False
    """Write the training step of pretraining and SFT as traced (StableHLO) and as compiled (HLO)."""

    def __post_init__(self):
        steps = self.traced_steps
        ok = self.steps is None or (steps is not None and 1 <= steps[0] <= steps[-1] <= MAX_SIZE)
        require_field(self, "profile.steps", ok, "write FIRST:LAST, two steps of which the first is at least 1")

    @property
    def traced_steps(self) -> range | None:
        """The steps to trace, if there are any."""
        found = re.fullmatch(r"(\d{1,10}):(\d{1,10})", self.steps or "")
        return (range(int(found[1]), int(found[2]) + 1) or None) if found else None
