"""The recorded data of one stage of a run."""

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
    """From `metrics.jsonl`."""
    loads: Sequence[Row]
    """From `expert_load.jsonl`."""
    samples: Sequence[Row]
    """From `samples.jsonl`."""

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a metric. A null becomes NaN, which leaves a gap in the curve, and so does a value beyond
        all that a model computes, from which the range of an axis cannot be computed."""
        pairs = [(row["step"], row[key]) for row in self.rows if key in row]
        steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
        return steps, np.where(np.abs(values) < 1e20, values, np.nan)

    def finite(self, key: str) -> np.ndarray:
        values = self.series(key)[1]
        return values[np.isfinite(values)]

    def keys(self, prefix: str) -> list[str]:
        """Names of the metrics with this prefix, in order of appearance."""
        return list(dict.fromkeys(key for row in self.rows for key in row if key.startswith(prefix)))
