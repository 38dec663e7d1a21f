"""`mla-moe data preview`."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import rich.text
import tyro

from mla_moe.cli.recipe import open_recipe
from mla_moe.config import require
from mla_moe.config.errors import require_between, visible
from mla_moe.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Data:
    """Show the examples of a recipe's fine-tuning data, token by token: those with a loss are green, a bar is between
    two tokens. Fields of the recipe are flags, as for train: `--sft.data chats.jsonl`."""

    action: tyro.conf.Positional[Literal["preview"]]
    recipe: tyro.conf.Positional[Path]
    """A recipe's .py or .json file."""
    stage: Literal["sft", "dpo"] | None = None
    """Stage whose data are shown. By default the first of the recipe."""
    examples: int = 3
    """Number of examples to show."""

    def __post_init__(self):
        require_between(self, "", "examples", 1, 1000)

    def run(self, flags: Sequence[str]) -> None:
        """`flags` set fields of the recipe."""
        import rich.console

        from mla_moe.training.dpo import open_preferences
        from mla_moe.training.run_context import open_chat_tokenizer, open_tokenizer
        from mla_moe.training.sft import formats, open_sft_data, skipped_examples

        recipe = open_recipe(self.recipe, flags, f"mla-moe data preview {self.recipe}")
        is_dpo = self.stage == "dpo" or (self.stage is None and recipe.dpo.active and not recipe.sft.active)
        section, most = (
            (recipe.dpo, recipe.dpo.sequence_length // 2) if is_dpo else (recipe.sft, recipe.sft.sequence_length)
        )
        field = f"{section.section}.data"
        require(len(section.data) > 0, field, section.data, "name the files of the examples")
        console = rich.console.Console(highlight=False, markup=False)
        with tempfile.TemporaryDirectory() as directory:  # for a tokenizer that the run would train
            run_dir = Path(recipe.run_dir) if (Path(recipe.run_dir) / "tokenizer.json").exists() else Path(directory)
            tokenizer = open_tokenizer(recipe, run_dir)
            chat = open_chat_tokenizer(recipe, run_dir, tokenizer)
            data = (open_preferences if is_dpo else open_sft_data)(recipe, chat, section.data, field)
        skipped = skipped_examples(data, most, "cut" if is_dpo else recipe.sft.truncation)
        for line in (f"{len(data):,} examples, of {formats(data)}", *skipped):
            console.print(visible(line))
        for number, example in zip(range(self.examples), data, strict=False):
            side_T = example.get("side", np.zeros_like(example["tokens"]))
            for side in np.unique(side_T):
                tokens, targets, mask = (example[name][side_T == side] for name in ("tokens", "targets", "loss_mask"))
                title = f"example {number + 1}{('', ', chosen', ', rejected')[side]}"
                console.print(f"\n{title}: {len(tokens)} tokens, {mask.sum()} with a loss", style="bold")
                console.print(shown_tokens([tokens[0], *targets], [0, *mask], tokenizer))


def shown_tokens(ids: Sequence[int], mask: Sequence[int], tokenizer: Tokenizer) -> rich.text.Text:
    """Tokens with bars between them. Those with a loss are green, and in «» for a terminal without colours."""
    shown = rich.text.Text()
    for token, trained, before in zip(map(int, ids), mask, [0, *mask], strict=False):
        edge = "│" if trained == before else "«" if trained else "»"
        shown.append(edge if len(shown) else "", style="dim")
        text = tokenizer.token_bytes(token).decode(errors="replace") or tokenizer.token_name(token)
        shown.append(visible(text), style="green" if trained else "")
    return shown.append("»" if mask[-1] else "", style="dim")
