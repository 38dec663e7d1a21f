"""`mla-moe report`."""

import dataclasses
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Report:
    """Write RUN_DIR/report.html: loss curves, expert load, RL metrics and sampled completions of a run."""

    run_dir: tyro.conf.Positional[Path]
    """The run's directory (`run_dir` in its recipe)."""

    def run(self) -> None:
        from mla_moe.report.page import write_report

        print(write_report(self.run_dir))
