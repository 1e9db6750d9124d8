"""How the number of users changes over a load test, as data that needs no Locust."""

from collections.abc import Sequence
from typing import Final

STEADY: Final = "steady"
SHAPES: Final[dict[str, Sequence[float]]] = {
    STEADY: (1.0,),
    "step": (0.2, 0.4, 0.6, 0.8, 1.0),
    "spike": (0.2, 1.0, 0.2),
}
"""The share of the users that run, in stages of the same length."""


def users_at(shape: str, users: int, elapsed: float, seconds: float) -> int | None:
    """Return how many of the users run so many seconds after the start, or None when it is over."""
    if elapsed >= seconds:
        return None
    stages = SHAPES[shape]
    return max(1, round(users * stages[int(len(stages) * elapsed / seconds)]))


def mean_users(shape: str, users: int) -> float:
    """Return how many users run on average."""
    return users * sum(SHAPES[shape]) / len(SHAPES[shape])
