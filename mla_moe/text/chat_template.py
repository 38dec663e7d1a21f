"""A checkpoint's chat template: conversations to text as transformers renders them, without tools or documents."""

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence

import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from mla_moe.config import ConfigError
from mla_moe.text.chat_tokenizer import Message


def chat_template(source: str, special: Mapping[str, str]) -> Callable[[Sequence[Message]], str]:
    """Text up to where the assistant speaks. `special` are names and texts of special tokens."""
    # A template comes with the checkpoint: it may compute text, and nothing else.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    functions = {"raise_exception": _refuse, "strftime_now": _strftime_now}
    template = functools.cache(lambda: environment.from_string(source, functions))  # a wrong one stops only chats

    def render(messages: Sequence[Message]) -> str:
        try:
            return template().render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **special
            )
        except Exception as error:  # a template is a program, and may fail like any
            raise ConfigError("messages", "", f"the chat template cannot take them: {error}") from None

    return render


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012, as Jinja has it

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
