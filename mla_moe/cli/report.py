"""`mla-moe report`."""

import dataclasses
from pathlib import Path

import tyro

from mla_moe.config import ConfigError
from mla_moe.config.hub import shown
from mla_moe.config.storage import is_bucket


@dataclasses.dataclass(frozen=True)
class Report:
    """Write RUN_DIR/report.html: loss curves, expert load, RL metrics and sampled completions of a run."""

    run_dir: tyro.conf.Positional[Path]
    """The run's directory (`run_dir` in its recipe)."""

    def run(self) -> None:
        from mla_moe.checkpoint.bucket_run import location, mirror_of, read_run
        from mla_moe.report.page import write_report

        run = read_run(self.run_dir, "run_dir", metrics=True) if is_bucket(self.run_dir) else self.run_dir
        if run is None:
            raise ConfigError("run_dir", shown(self.run_dir), "there is no run; give the URL of one")
        report = write_report(run)
        if mirror := mirror_of(report):
            mirror.upload_file(report)
        print(location(report))
