"""A run directory → `report.html`: one page that needs no network, no scripts and no other file.

A panel and a headline are each a function of a `Stage` that returns nothing where its data are missing, so a page shows
what a run has. To show more, write such a function and add it to the `PANELS` or `HEADLINES` of a file here.
"""

from mla_moe.report.page import write_report

__all__ = ["write_report"]
