"""How a question is put to the model."""

from mla_moe.config import ConfigError
from mla_moe.text.chat_tokenizer import ChatTokenizer

R1_ZERO_TEMPLATE = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>. User: {question}. Assistant:"
)
"""DeepSeek-R1 (arXiv 2501.12948), table 1."""


def render_prompt(template: str, question: str, language: ChatTokenizer) -> list[int]:
    """Token ids that the model continues, bos in front: `r1_zero`, `chat`, which is the tokenizer's own template and
    has its own special tokens, or a text with `{question}` in it, whose other braces stand for themselves.

    Raises `ConfigError` on `task.template` where the tokenizer has no chat template.
    """
    if template == "chat":
        try:
            return language.encode_chat([{"role": "user", "content": question}])
        except ConfigError as error:
            raise ConfigError("task.template", template, error.fix) from None
    text = R1_ZERO_TEMPLATE if template == "r1_zero" else template
    return language.encode(text.replace("{question}", question))
