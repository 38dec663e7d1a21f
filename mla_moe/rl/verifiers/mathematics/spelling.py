"""Spelling of answers: delimiters, fonts, spacing commands and synonyms are removed, and plain text becomes LaTeX."""

import itertools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction

NUMBER = r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
"""A decimal, with or without thousands separators and exponent."""
_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": r"\cdot ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "∪": r"\cup ", "±": r"\pm ", "²": "^2", "³": "^3",
    "½": r"\frac{1}{2}", "√": r"\sqrt ", "，": ",", "\u00a0": " ", "\u202f": " ",
})  # fmt: skip

Rule = tuple[str, str | Callable[[re.Match[str]], str]]

_SPELLING: list[Rule] = [
    (r"\\(?:left|right|displaystyle|big|Big)(?![a-zA-Z])", ""),
    (r"\\!|(?<=\d)\\,(?=\d{3})", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac *(\d) *(\d)", r"\\frac{\1}{\2}"),
    (r"(\d*)\.(\d*)\\overline *\{(\d+)\}", lambda match: _repeating(*match.groups())),
    (r"\{,\}", ","),
    (r"\\(?:text[a-z]*|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\varnothing", r"\\emptyset "),
    (r"[\[(]? *\\begin\{(?:array\}\{[clr| ]*|[bp]?matrix)\}", r"\\begin{pmatrix}"),
    (r"\\end\{(?:array|[bp]?matrix)\} *[\])]?", r"\\end{pmatrix}"),
    (r"^#+ *", ""),
    (r"\\(?:le|leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
    (r"\\(?:ge|geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
    (r"\\(?:times|cdot)(?![a-zA-Z])", r"\\cdot "),
    (r"\\(?:neq|ne)(?![a-zA-Z])|!=", r"\\ne "),
    (r"\\div(?![a-zA-Z])", "/"),
    (r"_\{(\w)\}", r"_\1"),
    (r"\^\s*\{?\\circ\}?|\\degree(?![a-zA-Z])", " degree "),
    (r"\\%", "%"),
    (r"\s+", " "),
]
_WRAPPERS: list[Rule] = [
    (r"\*\*([^*]+)\*\*", r"\1"),
    (r"\$\$([^$]+)\$\$", r"\1"),
    (r"\$((?:[^$\\]|\\.)+)\$", r"\1"),
    (r"\\\(((?:(?!\\\)).)+)\\\)", r"\1"),
    (r"\\\[((?:(?!\\\]).)+)\\\]", r"\1"),
    (r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})+)\}", r"\1"),
]
_PLAIN_TO_LATEX: list[Rule] = [
    (r"\*\*", "^"),
    (r"(?<=\d)\s*[eE]\s*([+-]?\d+)(?![\w.])", r"\\cdot 10^{\1}"),
    (r"\^\s*([+-]?\d+(?:\.\d+)?)", r"^{\1}"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![a-zA-Z\\])exp\s*\(([^()]*)\)", r"e^{\1}"),
    (r"(?<![a-zA-Z\\])(sqrt|sin|cos|tan|cot|sec|csc|log|ln|pi|arcsin|arccos|arctan)(?![a-zA-Z])", r"\\\1 "),
    (r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
    (r"(?<=\d)\s+(\d+)\s*/\s*(\d+)$", r"\\frac{\1}{\2}"),
    (r"(?<=\d)\s+(?=\\frac)", ""),
    (r"\*", r"\\cdot "),
]


def _replace(text: str, rules: Sequence[Rule]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def normalize(text: str) -> str:
    """The text without enclosing delimiters, fonts, spacing commands and a final period."""
    text, before = text.translate(_CHARACTERS), None
    while text != before:
        before, text = text, _replace(text, _SPELLING).removesuffix(".").strip()
        for pattern, replacement in _WRAPPERS:
            if re.fullmatch(pattern, text, re.DOTALL):
                text = re.sub(pattern, replacement, text, flags=re.DOTALL).strip()
    return text


def depths(text: str) -> list[int]:
    """For each character the number of brackets that are open after it."""
    return list(itertools.accumulate((c in "([{") - (c in ")]}") for c in text))


def without_spaces(text: str) -> str:
    return re.sub(r"(?<!\d) | (?!\d)", "", text)  # 4 4/9 is not 44/9


def _repeating(whole: str, digits: str, period: str) -> str:
    """A repeating decimal as a fraction."""
    value = Fraction(f"{whole or 0}.{digits}") + Fraction(int(period), 10 ** len(digits) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def to_latex(text: str) -> str:
    if re.fullmatch(NUMBER, text):
        return text.replace(",", "")
    if "(" not in text and "[" not in text:  # (1,234) is a pair
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return _replace(text, _PLAIN_TO_LATEX)
