"""What a text answers: the letter of a choice, or one or several quantities, each with its unit."""

import re
from typing import NamedTuple

from .spelling import NUMBER, normalize, to_latex

CHOICE = re.compile(r"\(?([A-J]|(?<=\()[a-j])\)?[.:]?")
_ANSWERED_CHOICE = re.compile(
    r"(?:(?:the )?(?:answer|option|choice)(?: is)?:? *)?\(?([A-Ja-j])(?:[).:]+(?: .*)?)?", re.I
)
_OTHER_CHOICE = re.compile(
    r"(?:\bor|\band|[,/]) *\(?[A-Ja-j]\b|\([A-Ja-j]\)|\b[A-J][).:]|\b[B-J]\b|\bnot\b|n't\b", re.I
)


def chosen(answer: str) -> str | None:
    """The letter of the choice that an answer names, if it names exactly one."""
    match = _ANSWERED_CHOICE.fullmatch(answer)
    if match is None:
        return None
    rest = answer[match.end(1) + 1 :]
    others = [other for other in _OTHER_CHOICE.findall(rest) if other != match[1]]
    return None if others or re.fullmatch(r"\W*A\W*", rest) else match[1].upper()  # elsewhere A may be an article


class Quantity(NamedTuple):
    latex: str
    unit: str
    percent: bool


_CURRENCY = {
    "$": "dollar", "usd": "dollar", "us$": "dollar", "€": "euro", "eur": "euro", "£": "pound", "¥": "yen", "₹": "rupee"
}  # fmt: skip
_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "gram": "g", "kilogram": "kg", "second": "s", "sec": "s", "minute": "min", "hour": "h",
    "hr": "h", "liter": "l", "litre": "l", "feet": "foot", "ft": "foot", "inch": "in", "inche": "in", "deg": "degree",
    "dollar": "dollar", "buck": "dollar", "yr": "year", "day": "day", "men": "man", "cup": "cup", "ton": "ton",
}  # fmt: skip
_ABBREVIATIONS = re.compile(r"[cmk]m|[mk]?g|m[lL]|[kMG]?Hz|k?Wh?|eV|k?Pa|mol|lb|oz|mph")
_POWER = r"(?: *\^\{?[0-9-]+\}?)?"
_UNIT = rf"(?:degree(?: *[CF])?|[a-zA-Z]+{_POWER})(?:(?: *(?:/|per\b|of\b|\\cdot) *| +)[a-zA-Z]+{_POWER})*"
_ONE_LETTER_UNITS = frozenset("mgshlLNJWVAKCF")
_SCALES = {
    "hundred": "100", "dozen": "12", "thousand": "1000", "million": "1000000", "billion": "1000000000",
    "trillion": "1000000000000",
}  # fmt: skip
_NUMERALS = "|".join(_SCALES) + "|zero|one|two|three|four|five|six|seven|eight|nine|ten|half"
_NO_UNIT = re.compile(
    rf"(?:{_NUMERALS})s?|halves|(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?"
    r"|squared?|cubed?|factorial|times?|minus|plus|over|inverse|reciprocal|below|above|negative|root"
    r"|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega"
)
"""Words after a number that change it."""
_FUNCTION = re.compile(
    r"(?:arc)?(?:sin|cos|tan)|sqrt|pi|cot|sec|csc|log|ln|exp|inf|infinity|oo|and|or|in|mod|max|min|gcd|lcm"
)
_SHORT_WORD = re.compile(r"its?|i[ns]|the|are|was|be|by|t?o|of|so|not?|yes|an|a[st]|[ws]?he|we|you|for|has|but|on")
_UNCLEAR = re.compile(
    r"\b(?:not|never|cannot|minus|negative|root|than|least|most|twice|times|wrong|incorrect|or|n?either|except"
    rf"|{_NUMERALS})\b|n't\b",
    re.IGNORECASE,
)
"""Words by which a sentence may not stand for its only number."""


def _prose(text: str) -> bool:
    """Whether a text contains words, as opposed to products of variables."""
    words = re.findall(r"(?<![\\a-zA-Z])[^\W\d_]{2,}", text)
    words = [word.casefold() for word in words if not _FUNCTION.fullmatch(word.casefold())]
    if any(len(word) >= 4 or _SHORT_WORD.fullmatch(word) for word in words):
        return True
    return any(set(word) & set("aeiou") for word in words) and not re.search(r"[\d+*/^=<>\\-]", text)


def split(text: str) -> list[str]:
    """The parts of an enumeration, separated outside of brackets."""
    if re.fullmatch(rf"\W*(?:{NUMBER})\W*", text):  # the commas of 1,234,567
        return [text]
    parts, depth = [""], 0
    for token in re.findall(r"\\[{}]|\\[a-zA-Z]+|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|.", text, re.DOTALL):
        depth += token in ("(", "[", "{", r"\{") or -(token in (")", "]", "}", r"\}"))
        if depth == 0 and token in (",", ";", "and", "or"):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def enumerated_words(text: str) -> list[str]:
    return sorted(" ".join(part.casefold().split()) for part in split(text))


def quantities(text: str) -> list[Quantity] | None:
    """The answers that a text gives, None if it is words."""
    if re.fullmatch(r"\\\{.*\\\}", text):
        text = text[2:-2]
    parts = split(text)
    if len(parts) > 1 and "=" not in "".join(parts[1:]):  # x = 2, 3
        parts[0] = re.sub(r"^[a-zA-Z] *=", "", parts[0])
    found: list[Quantity] = []
    for part in parts:
        quantity = _quantity(part)
        if quantity is None:
            return _of_sentence(text)
        signs = ("+", "-") if r"\pm" in quantity.latex else ("",)
        found += [quantity._replace(latex=quantity.latex.replace(r"\pm", sign).strip()) for sign in signs]
    return found or None


def _quantity(text: str) -> Quantity | None:
    """An expression with its unit; None if it is a time of day or contains words."""
    if re.fullmatch(r"\d+(?::\d\d)+", text):
        return None
    value, unit = text, ""
    if match := re.fullmatch(r"(-?) *\\?(US\$|USD|\$|€|£|¥|₹|EUR) *(-?[\d.].*)", text):
        value, unit = match[1] + match[3], _CURRENCY[match[2].casefold()]
    if match := re.fullmatch(r"(.*[\d)}\]]) *(%|percent)(?: *(.*))?", value):
        value, rest = match[1], match[3] or ""
        return None if rest or _prose(value) else Quantity(to_latex(value), unit, True)
    if match := re.fullmatch(rf"({NUMBER}) *({'|'.join(_SCALES)})\b *(.*)", value):
        value = f"{match[1].replace(',', '')} * {_SCALES[match[2]]} {match[3]}".strip()
    if match := re.fullmatch(rf"(.*?[\d)}}\]!])( *)({_UNIT}|\\?\$|€|£)", value):
        has_variables = re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", match[1]) is not None
        named = _unit(match[3], spaced=bool(match[2]) and not has_variables)
        value, unit = (value, unit) if named is None else (match[1], unit or named)
    return None if _prose(value) or "$" in value else Quantity(to_latex(value), unit, False)


def _unit(text: str, spaced: bool) -> str | None:
    """The standard name of a unit; None if it may be a product of variables."""
    names = []
    for word in re.findall(r"[a-zA-Z]+|\^\{?[0-9-]+\}?|/|\$|€|£", text):
        singular = word if len(word) < 3 else word.casefold().removesuffix("s")
        if word[0] in "^/$€£":
            names.append(_CURRENCY.get(word, word.replace("{", "").replace("}", "")))
        elif known := _UNITS.get(singular.casefold()) or (_ABBREVIATIONS.fullmatch(word) and word):
            names.append(known)
        elif word in _ONE_LETTER_UNITS and (spaced or names):
            names.append(word)
        elif singular == "degree" or (spaced and re.fullmatch(r"(?=.*[aeiou])[a-zA-Z]{4,}|per|of|sq", word)):
            if _NO_UNIT.fullmatch(word.casefold()) and not (word == "square" and not names):
                return None
            names.append({"per": "/", "usd": "dollar"}.get(singular, singular))
        else:
            return None
    if names[0] == "square" or names[0] == "sq":
        names = [*names[1:], "^2"]
    return " ".join(names)


def _of_sentence(text: str) -> list[Quantity] | None:
    """What follows the `is` or colon of a sentence, or else its only number or formula."""
    match = re.fullmatch(r"([^\d$\\=]*(?:\bis|\bare|:)) *(.+)", text)
    if match and not _prose(match[2]) and not _UNCLEAR.search(match[1]):
        return quantities(normalize(match[2]))
    if _UNCLEAR.search(text):
        return None
    formula = r"(?<!\\)\$((?:[^$\\]|\\.)+)\$"
    formulas, rest = re.findall(formula, text), re.sub(formula, "", text)
    numbers = re.findall(rf"(?<![\w.])(?:\\?[$€£] *)?(?:{NUMBER})(?!\w)(?: *%)?", rest)
    values = {*numbers, *(one for one in formulas if len(one.strip()) > 1)}  # $n$ is only a name
    is_sentence = len(re.findall(r"[^\W\d_]{2,}", rest)) > 1  # March 14 is none
    if len(values) != 1 or not is_sentence or re.search(r"[*^=+<>]\s*\w", rest):
        return None
    quantity = _quantity(normalize(values.pop()))
    return [quantity] if quantity else None
