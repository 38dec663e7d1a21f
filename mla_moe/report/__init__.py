"""The HTML report of a run: `report.html`, one page without scripts, network requests or other files.

Each panel (a plot) and each headline (a figure) is a function of a `StageRecord` that returns nothing if its data are
missing, so a page shows what the run recorded. To add one, write such a function and add it to `PANELS` or `HEADLINES`.
"""

from mla_moe.report.page import write_report

__all__ = ["write_report"]
