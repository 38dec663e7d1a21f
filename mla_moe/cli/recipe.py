"""A recipe and its flags, as `train`, `plan` and `data` take them."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from mla_moe.config import ConfigError, Recipe, load_recipe, with_overrides
from mla_moe.config.storage import is_url

logger = logging.getLogger(__name__)


def split_recipe(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The recipe's path, and the flags before and after it; an empty path if there is none. Before the path, each flag
    has one value."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("--") and arguments[place] != "--help":
        place += 1 if "=" in arguments[place] else 2
    rest = list(arguments)
    path = rest.pop(place) if place < len(rest) and not rest[place].startswith("-") else ""
    return path, rest


def open_recipe(path: str | Path, flags: Sequence[str], prog: str, description: str = "") -> Recipe:
    """The recipe with the fields that the flags override. With `model_from = "init_from"`, model and tokenizer are
    those of the checkpoint. Raises as `load_recipe` and `with_overrides` do, and `ConfigError` for such a recipe
    without a checkpoint."""
    recipe = load_recipe(path)
    if recipe.model_from == "init_from" and not {"--help", "-h"} & set(flags):
        recipe = _with_model_of(recipe, _value(flags, "init-from") or recipe.init_from, flags)
    return with_overrides(recipe, flags, prog, description)


def _value(flags: Sequence[str], name: str) -> str | None:
    """The value of the last flag of this name."""
    found = None
    for flag, following in itertools.zip_longest(flags, flags[1:]):
        given, equals, value = flag.partition("=")
        if given.replace("_", "-") == f"--{name}":
            found = value if equals else following
    return found


def _with_model_of(recipe: Recipe, init_from: str | None, flags: Sequence[str]) -> Recipe:
    from mla_moe.checkpoint.reader import open_checkpoint
    from mla_moe.checkpoint.tokenizer_files import tokenizer_file

    if init_from is None:
        raise ConfigError("init_from", None, "name the checkpoint whose model this recipe takes: --init-from DIR")
    checkpoint = open_checkpoint(init_from)
    file = tokenizer_file(checkpoint.directory)
    data = dataclasses.replace(recipe.data, tokenizer=init_from if file and is_url(init_from) else str(file or "byte"))
    sections, limit = {}, checkpoint.cfg.max_position_embeddings
    for section, most in ((recipe.sft, limit), (recipe.dpo, 2 * limit)):  # a pair has two sides
        if section.active and section.sequence_length > most:
            if _value(flags, f"{section.section}.sequence-length") is None:  # otherwise the flag's value follows
                note = "%s.sequence_length = %d is more than the model has positions; %d instead"
                logger.warning(note, section.section, section.sequence_length, most)
            sections[section.section] = dataclasses.replace(section, sequence_length=most)
    rl = recipe.rl
    if rl.steps and rl.max_prompt_tokens + rl.max_new_tokens > limit:
        prompt = min(rl.max_prompt_tokens, max(limit // 4, 1))
        changes = {"max_prompt_tokens": prompt, "max_new_tokens": limit - prompt}
        if not all(_value(flags, f"rl.{name.replace('_', '-')}") for name in changes):
            note = "rl.max_prompt_tokens + rl.max_new_tokens = %d is more than the model has positions; %d + %d instead"
            note += ", where no flag gives them"
            logger.warning(note, rl.max_prompt_tokens + rl.max_new_tokens, *changes.values())
        sections["rl"] = dataclasses.replace(rl, **changes)
    return dataclasses.replace(
        recipe, model=checkpoint.cfg, model_from="recipe", init_from=init_from, data=data, **sections
    )
