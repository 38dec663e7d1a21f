"""Prompt templates: DeepSeek-R1-Zero's, the tokenizer's chat template, or a text of the user."""

from mla_moe.config import ConfigError
from mla_moe.text.chat_tokenizer import ChatTokenizer

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948), table 1."""


def render_prompt(template: str, question: str, tokenizer: ChatTokenizer) -> list[int]:
    """The token ids of a prompt, with bos in front.

    `template` is `r1_zero`, `chat` (the tokenizer's chat template, which adds its own special tokens), or a text that
    contains `{question}`; special tokens in it are encoded as such, and other braces are plain text. Raises
    `ConfigError` on `task.template` for `chat` if the tokenizer has no chat template.
    """
    if template == "chat":
        try:
            return tokenizer.encode_chat([{"role": "user", "content": question}])
        except ConfigError as error:
            raise ConfigError("task.template", template, error.message) from None
    if template == "r1_zero":
        return tokenizer.encode(R1_ZERO_TEMPLATE.replace("{question}", question))
    return tokenizer.encode_template(template, question)
