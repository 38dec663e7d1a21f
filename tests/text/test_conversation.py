"""Which tokens of a conversation are trained on, with the features of released chat templates rebuilt small."""

import json

import pytest
import tokenizers

from mla_moe import ConfigError

pytest.importorskip("jinja2")
from mla_moe.text.chat_template import chat_template
from mla_moe.text.chat_tokenizer import Conversation, load_chat_tokenizer
from mla_moe.text.conversation import training_sequences
from mla_moe.text.tokenizer import HFTokenizer, train_bpe

V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|out|>{{ m.content }}<|end_out|>"
    "{% elif m.tool_calls %}<|Assistant|>{% for c in m.tool_calls %}<|call|>{{ c.function.name }}"
    "{{ '\n' + c.function.arguments }}<|end_call|>{% endfor %}<|eos|>"
    "{% elif loop.previtem.role == 'tool' %}{{ m.content }}<|eos|>{% else %}<|Assistant|>{{ m.content }}<|eos|>"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}<|Assistant|>{% endif %}"
)
"""Tool calls with their arguments as text."""
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
"""Leaves the reasoning out of every turn, and opens it in the prompt."""
V3_1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|></think>{{ m.content.split('</think>', 1)[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
K2 = (
    "{% for m in messages %}<|im_{{ m.role }}|>{{ m.role }}<|im_middle|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
GLM = (
    "[gMASK]{% if tools %}<|system|>{{ tools | tojson }}{% endif %}{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == 'tool' %}"
    "<|observation|>{{ m.content }}{% else %}<|assistant|>"
    "{% if loop.index0 > ns.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% else %}</think>"
    "{% endif %}{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}</tool_call>{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{{ '</think>' if enable_thinking is false else '<think>' }}"
    "{% endif %}"
)
"""No end token: the next role is one. Reasoning after the last user message only; arguments as an object."""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM]{{ m.content }}[/SYSTEM]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}<|eos|>{% endif %}{% endfor %}"
)
"""No generation prompt."""
QWEN = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% if loop.index0 > ns.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Leaves the reasoning out of all turns but the last, and writes a newline after the end token."""
TOKENS = """
<|User|> <|Assistant|> <|eos|> <|call|> <|end_call|> <|out|> <|end_out|> <think> </think> <|im_user|> <|im_system|>
<|im_assistant|> <|im_middle|> <|im_start|> <|im_end|> [gMASK] <|system|> <|user|> <|assistant|> <|observation|>
<tool_call> </tool_call> [INST] [/INST] [SYSTEM] [/SYSTEM]
""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(["one two, three four: five six seven. assistant user\n" * 4], 290, path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(TOKENS)
    tokenizer.save(str(path))
    names = {"bos_token": "<s>", "eos_token": "<|eos|>"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(names))
    return path.parent


@pytest.fixture(scope="module")
def sequences(directory):
    """Of a conversation, each sequence as text, in which what is trained on stands in «»."""
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))

    def sequences(template, *messages, stop=("<|eos|>",), tools=None, trained=None):
        render = chat_template(template, {"bos_token": "<s>"})
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant"] if trained is None else trained
        stops = [tokenizer.token_to_id(token) for token in stop]
        shown = []
        for ids, ranges in training_sequences(render, tokenizer, stops, messages, tools, trained):
            text, at = "", 0
            for start, end in ranges:
                text += f"{tokenizer.decode(ids[at:start], False)}«{tokenizer.decode(ids[start:end], False)}»"
                at = end
            shown.append(text + tokenizer.decode(ids[at:], False))
        return shown

    return sequences


def say(*contents, **keys):
    """A conversation that begins with the user."""
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content, **keys} for role, content in zip(roles, contents, strict=False)]


def call(arguments):
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


TWO = say("one", "<think>\ntwo\n</think>\n\nthree", "four", "<think>\nfive\n</think>\n\nsix")
PLAIN = say("one", "two", "three", "four")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (V3, PLAIN, ["<s><|User|>one<|Assistant|>«two<|eos|>»<|User|>three<|Assistant|>«four<|eos|>»"]),
        (
            R1,
            TWO,
            [
                "<s><|User|>one<|Assistant|><think>\n«two\n</think>\n\nthree<|eos|>»",
                "<s><|User|>one<|Assistant|>\n\nthree<|eos|><|User|>four<|Assistant|><think>\n«five\n</think>\n\nsix<|eos|>»",
            ],
        ),
        (R1, PLAIN[:2], ["<s><|User|>one<|Assistant|><think>\n«\n</think>\n\ntwo<|eos|>»"]),
        (
            V3_1,
            PLAIN,
            ["<s><|User|>one<|Assistant|></think>«two<|eos|>»<|User|>three<|Assistant|></think>«four<|eos|>»"],
        ),
        (V3_1, say("one", "<think>two</think>three"), ["<s><|User|>one<|Assistant|><think>«two</think>three<|eos|>»"]),
        (
            MISTRAL,
            [{"role": "system", "content": "one"}, *PLAIN],
            ["<s>[SYSTEM]one[/SYSTEM][INST]one[/INST]«two<|eos|>»[INST]three[/INST]«four<|eos|>»"],
        ),
    ],
)  # fmt: skip
def test_turns_are_trained_on_after_the_prompt_that_asks_for_them(sequences, template, messages, expected):
    assert sequences(template, *messages) == expected


def test_end_tokens(sequences):
    assert sequences(K2, *PLAIN, stop=("<|im_end|>",)) == [
        "<|im_user|>user<|im_middle|>one<|im_end|><|im_assistant|>assistant<|im_middle|>«two<|im_end|>»"
        "<|im_user|>user<|im_middle|>three<|im_end|><|im_assistant|>assistant<|im_middle|>«four<|im_end|>»"
    ]
    assert sequences(QWEN, *TWO, stop=("<|im_end|>",)) == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n«<think>\ntwo\n</think>\n\nthree<|im_end|>»\n",
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nthree<|im_end|>\n<|im_start|>user\nfour<|im_end|>\n"
        "<|im_start|>assistant\n«<think>\nfive\n</think>\n\nsix<|im_end|>»\n",
    ], "not the newline after them"
    stop = ("<|eos|>", "<|user|>", "<|observation|>")
    thought = {"role": "assistant", "content": "two", "reasoning_content": "why"}
    messages = [PLAIN[0], call('{"x": 1}'), {"role": "tool", "content": "3"}, thought]
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(ConfigError, match="items"):
        sequences(GLM, *messages, stop=stop, tools=tools)
    messages[1] = call({"x": 1})
    head = "[gMASK]<|system|>" + json.dumps(tools) + "<|user|>one<|assistant|>"
    assert sequences(GLM, *messages, stop=stop, tools=tools) == [
        f"{head}<think>«</think><tool_call>fx=1</tool_call><|observation|>»",
        f"{head}</think><tool_call>fx=1</tool_call><|observation|>3<|assistant|><think>«why</think>two<|user|>»",
    ], "the next role, which is in no rendering of the last turn"
    assert sequences("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                     "{% if add_generation_prompt %}assistant:{% endif %}", *PLAIN) == [
        "user: one\nassistant:« two\n<|eos|>»",
        "user: one\nassistant: two\nuser: three\nassistant:« four\n<|eos|>»",
    ], "no token ends the first turn within the second's text"  # fmt: skip


def test_tools_and_turns_that_are_not_trained_on(sequences):
    messages = [PLAIN[0], call('{"x": 1}'), {"role": "tool", "content": "3"}, PLAIN[1]]
    text = "<s><|User|>one<|Assistant|>{}<|out|>3<|end_out|>«two<|eos|>»"
    spoken = '<|call|>f\n{"x": 1}<|end_call|><|eos|>'
    assert sequences(V3, *messages) == [text.format(f"«{spoken}»")]
    assert sequences(V3, *messages, trained=[3]) == [text.format(spoken)]


def test_a_token_never_lies_on_both_sides_of_the_prompts_end(sequences):
    """` two` is one token, and the space belongs to the prompt."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|eos|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    assert sequences(template, *say("one", "two")) == ["user: one<|eos|>assistant: «two<|eos|>»"]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("<|User|>{{ messages[0].content }}<|Assistant|>", "'two' of the assistant is lost"),
        ("{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}", "'one' of the user is lost"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}",
            r"renders 'one<\|Assistant\|>' in the prompt and 'onetwo' in the whole conversation",
        ),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "renders '1one' in the prompt"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "does not render tools"),
    ],
)
def test_a_wrong_template_is_an_error(sequences, template, error):
    with pytest.raises(ConfigError, match=error):
        sequences(template, *say("one", "two"), tools=[{}] if "tools" in error else None)


def test_in_the_worker_process(directory):
    """Arguments are given as an object, and as text where the template fails; one bad conversation is one error."""
    (directory / "chat_template.jinja").write_text(V3)
    chat = load_chat_tokenizer(directory, HFTokenizer(directory / "tokenizer.json"))
    good = Conversation([PLAIN[0], call({"x": 1})], [1])
    nested = json.loads("[" * 700 + "]" * 700)
    bad = [Conversation([*PLAIN[:1], {"role": "system", "content": "x"}], [1]), Conversation(PLAIN[:2], [1], nested)]
    found = chat.encode_training([good, *bad, good])
    assert found[0] == found[3]
    assert isinstance(found[2], str)
    (ids, [[start, end]]) = found[0][0]
    assert (end, ids[-1]) == (len(ids), chat.stop_ids[0])
    assert ids[:start] == chat.encode_chat([PLAIN[0]])
    assert found[1].startswith("messages = 1: the chat template renders '<s>")
