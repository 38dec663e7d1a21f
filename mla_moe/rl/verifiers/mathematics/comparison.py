"""Comparison of quantities: sets, tuples, equations and expressions, which math-verify and sympy parse and compare."""

import logging
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex

from .answers import Quantity, split
from .spelling import NUMBER, depths

# It warns that its time limits are off: they use signals, and the pool has a timeout of its own.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

MAX_EXPONENT = 10_000
"""Largest exponent that is computed, largest number whose factorial is, and largest bound of a sum."""


class UnparsedError(ValueError):
    """Two different texts, one of which is neither mathematics nor words."""


def connectives(text: str) -> frozenset[str]:
    """The words between relations, of which `and` and `or` differ."""
    is_relation = re.search(r"[<>]|\\[lg]e(?![a-zA-Z])", text)
    return frozenset(re.findall(r"\b(?:and|or)\b", text)) if is_relation else frozenset()


def same_answers(expected: list[Quantity], found: list[Quantity]) -> bool:
    """Whether each answer of one side equals an answer of the other."""
    variables = ({_variable(quantity) for quantity in side} for side in (expected, found))
    if len(expected) == len(found) and len(next(variables)) > 1 and "" in next(variables):  # x = 2, y = 3 and 2, 3
        return all(map(_same, expected, found))
    return _same_sets(expected, found, _same)


def _same_sets(expected: Sequence[Any], found: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    pairs = [[same(a, b) for b in found] for a in expected]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


def _variable(quantity: Quantity) -> str:
    match = re.match(r"([a-zA-Z]\w*) *=(?!=)", quantity.latex)
    return match[1] if match else ""


def _same(a: Quantity, b: Quantity) -> bool:
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if a.percent != b.percent:
        percent, other = (a, b) if a.percent else (b, a)
        return _same_value(percent.latex, other.latex) or _same_value(f"({percent.latex})/100", other.latex)
    return _same_value(a.latex, b.latex)


_NAME = re.compile(r"\\?[a-zA-Z]+(?: [A-Z]+)?(?:_\{?\w+\}?)?(?:\([\w, ]+\))?|\([a-zA-Z](?:, *[a-zA-Z])*\)")
"""What stands before the equals sign of an answer: a variable, a function, an angle, or a tuple of variables."""


def _sides(text: str) -> list[str]:
    """The sides of an equation, or the text."""
    marked = "".join("\0" if c == "=" and depth == 0 else c for c, depth in zip(text, depths(text), strict=True))
    return [side.strip() for side in marked.split("\0")]


_BRACKETS = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)


def _same_value(a: str, b: str) -> bool:
    if a == b:
        return True
    if a.count("'") != b.count("'") or re.search(r"\d *_", a + b):  # derivatives; numerals with a base
        return False
    sides, others = _sides(a), _sides(b)
    if (len(sides) > 1) != (len(others) > 1):
        *rest, value = max(sides, others, key=len)
        rest = rest[1:] if _NAME.fullmatch(rest[0]) else rest
        return all(_same_value(side, value) for side in rest) and _same_value(value, min(sides, others, key=len)[0])
    if len(sides) == len(others) == 2 and _NAME.fullmatch(sides[0]) and _NAME.fullmatch(others[0]):
        return sides[0] == others[0] and _same_value(sides[1], others[1])
    if r"\cup" in a and r"\cup" in b:
        return _same_sets(a.split(r"\cup"), b.split(r"\cup"), _same_value)
    first, second = _sequence(a), _sequence(b)
    if first and second:
        (brackets, items), (others_brackets, others) = first, second
        return brackets == others_brackets and len(items) == len(others) and all(map(_same_value, items, others))
    x, y = _parse(a), _parse(b)
    a_is_decimal, b_is_decimal = (re.fullmatch(NUMBER, text) is not None for text in (a, b))
    if a_is_decimal != b_is_decimal:
        value, decimal = (y, a) if a_is_decimal else (x, b)
        if isinstance(value, sympy.Expr) and value.is_number:
            return _rounds_to(value, decimal)
    if isinstance(x, sympy.MatrixBase) and isinstance(y, sympy.MatrixBase):
        return x.shape == y.shape and all(map(_same_expression, x.flat(), y.flat()))
    if isinstance(x, sympy.Expr) and isinstance(y, sympy.Expr):
        return _same_expression(x, y)
    return math_verify.verify(x, y, timeout_seconds=0)


def _same_expression(x: sympy.Expr, y: sympy.Expr) -> bool:
    x, y = x.doit(), y.doit()
    return bool(sympy.simplify(x - y) == 0 or x.equals(y))


def _sequence(text: str) -> tuple[str, list[str]] | None:
    """The kinds of the brackets and the items of a tuple or an interval."""
    match = _BRACKETS.fullmatch(text.strip())
    items = split(match[2]) if match else []
    return (match[1] + match[3], items) if match and len(items) > 1 and split(text) == [text.strip()] else None


_NORMALIZATION = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")


def _parse(latex: str) -> sympy.Basic:
    """The expression, with decimals as exact fractions: sympy compares floats with a tolerance."""
    if re.fullmatch(NUMBER, latex):
        if abs(int(latex.casefold().partition("e")[2] or 0)) > MAX_EXPONENT:
            raise UnparsedError(f"too large to compute: {latex:.100}")
        number = Fraction(latex)
        return sympy.Rational(number.numerator, number.denominator)
    if re.search(r"(?<![_\d])\d+ +[\d.]|phantom", latex):
        raise UnparsedError(f"two numbers without an operator: {latex:.100}")
    try:
        parsed = latex2sympy(
            normalize_latex(latex, _NORMALIZATION), is_real=True, convert_degrees=False, normalization_config=None
        )
    except Exception as error:  # the parser raises many types
        raise UnparsedError(f"cannot be parsed: {latex:.100}") from error
    if not isinstance(parsed, sympy.Basic):
        return parsed
    for part in sympy.postorder_traversal(parsed):  # inner parts first, so that this never computes a huge number
        size = part.args[-1] if isinstance(part, sympy.Pow | sympy.factorial) else sympy.S.Zero
        digits = sympy.log(abs(part.args[0]) + 1, 10) if isinstance(part, sympy.Pow) else sympy.S.One
        digits = digits.n(3) if digits.is_number else sympy.S.One
        if size.is_number and abs(size.n(3)) * max(digits, 1) > MAX_EXPONENT:
            raise UnparsedError(f"too large to compute: {latex:.100}")
    return parsed.xreplace({number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)})


def _rounds_to(value: sympy.Expr, decimal: str) -> bool:
    """Whether a value is a decimal exactly, or rounds to it and it has at least 6 significant digits."""
    if value.is_finite is False or value is sympy.nan:
        return False
    mantissa, _, exponent = decimal.casefold().partition("e")
    digits = mantissa.lstrip("+-").replace(".", "").lstrip("0")
    places = len(mantissa.partition(".")[2]) - int(exponent or 0)
    difference = sympy.Abs(value.doit() - _parse(decimal))
    unit = sympy.Rational(10) ** -places
    return bool(sympy.simplify(difference) == 0 or ("." in decimal and len(digits) >= 6 and difference <= unit / 2))
