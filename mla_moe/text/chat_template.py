"""Chat template of a checkpoint: renders conversations as transformers does, without documents."""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mla_moe.config import ConfigError

if TYPE_CHECKING:
    from mla_moe.text.tokenizer import Message


def chat_template(source: str, special: Mapping[str, str]) -> Callable[..., str]:
    """A function `(messages, tools=None, generation=True, **options)` that renders a conversation, by default with the
    generation prompt at the end. Options are further variables of the template, such as `enable_thinking`.

    `source` is the Jinja template. `special` maps `bos_token` and the like to their text. The function raises
    `ConfigError` where the template fails.
    """
    # The template comes with the checkpoint and is not trusted: the sandbox lets it compute text and nothing else.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    template = functools.cache(
        lambda: environment.from_string(source, functions)
    )  # compiled at first use, so that an invalid template fails chats only

    def render(
        messages: Sequence["Message"], tools: Sequence[Any] | None = None, generation: bool = True, **options: Any
    ) -> str:
        variables = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": generation}
        try:
            return template().render(**variables, **special, **options)
        except Exception as error:  # a template is a program and can raise anything
            why = str(error) or type(error).__name__
            raise ConfigError("messages", "", f"the chat template cannot render them: {why}") from None

    return render


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on; rendering keeps its content only."""

    tags = {"generation"}  # noqa: RUF012, as in Jinja

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: without the escapes for HTML of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
