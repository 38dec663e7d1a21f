"""What one stage of a run left behind."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class StageRecord:
    name: str
    recipe: Row
    rows: Sequence[Row]
    """Of `metrics.jsonl`."""
    loads: Sequence[Row]
    """Of `expert_load.jsonl`."""
    samples: Sequence[Row]
    """Of `samples.jsonl`."""

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric where it was written; a null is NaN, which leaves a gap in a curve."""
        pairs = [(row["step"], row[key]) for row in self.rows if key in row]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, values

    def finite(self, key: str) -> np.ndarray:
        values = self.series(key)[1]
        return values[np.isfinite(values)]

    def keys(self, prefix: str) -> list[str]:
        """The metrics whose names begin so, in the order in which they came."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))
