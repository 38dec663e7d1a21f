"""MkDocs hook: fill in what pages take from the code."""

from typing import Any

from mla_moe.config.architectures import ARCHITECTURES

MARK = "<!-- table of architectures -->"


def architectures_table() -> str:
    """A row for each architecture of the registry."""
    rows = [("`model_type`", "models", "what differs from DeepSeek-V3", "presets"), ("---",) * 4]
    for architecture in dict.fromkeys(ARCHITECTURES.values()):
        types = ", ".join(f"`{name}`" for name in (architecture.model_type, *architecture.aliases))
        presets = ", ".join(f"`{name}`" for name in architecture.presets)
        rows.append((types, architecture.models, architecture.differs, presets))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARK, architectures_table())
