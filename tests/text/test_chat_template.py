import pytest

from mla_moe import ConfigError

pytest.importorskip("jinja2")
from mla_moe.text.chat_template import chat_template

MESSAGES = [{"role": "user", "content": "é<"}, {"role": "user", "content": "b"}]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "é<"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "é<b"),
        ("{{ messages[:1] | tojson }}", '[{"role": "user", "content": "é<"}]'),
        ("{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=True, sort_keys=True) }}", r'{"a": "\u00e9", "b": 1}'),
        ("{% if tools is not none or documents is not none %}tools{% endif %}", ""),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ bos_token }}{{ eos_token }}", "<s>"),
    ],
)
def test_text_is_that_of_transformers(template, text):
    """What 5.23.0 renders."""
    assert chat_template(template, {"bos_token": "<s>"})(MESSAGES) == text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ messages.index(3) }}", "not in list"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ raise_exception('no tools') }}", "no tools"),
    ],
)
def test_a_template_that_fails_says_why(template, why):
    with pytest.raises(ConfigError, match=why):
        chat_template(template, {})(MESSAGES)
