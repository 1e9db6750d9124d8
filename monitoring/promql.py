"""As much of PromQL as it takes to know which series an expression reads."""

import re
from typing import Final

WORDS: Final = frozenset(
    {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
)
_STRING: Final = re.compile(r'"(?:\\.|[^"\\])*"' + r"|'(?:\\.|[^'\\])*'")
_BRACES: Final = re.compile(r"\{[^{}]*\}")
_RANGE: Final = re.compile(r"\[[^\[\]]*\]")
_LABELS: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^()]*\)")
_NAME: Final = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(?!\s*\()(?![\w:])")


def metric_names(expression: str) -> set[str]:
    """Return the names of the series that an expression selects, without labels, functions and operators."""
    for pattern in (_STRING, _BRACES, _RANGE, _LABELS):
        expression = pattern.sub(" ", expression)
    names = set(_NAME.findall(expression))
    return {name for name in names if name.lower() not in WORDS and name.lower() not in {"inf", "nan"}}


def buckets(expression: str) -> set[str]:
    """Return the values of `le` that an expression names."""
    return set(re.findall(r'\ble="([^"]+)"', expression))
