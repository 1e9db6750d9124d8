"""The model that ships, and the candidates it was chosen from."""

from collections.abc import Iterator
from typing import Final, TypeAlias

from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor

Forest: TypeAlias = ExtraTreesRegressor | RandomForestRegressor

SEED: Final = 1


def make_model() -> Forest:
    """Return the model that ships, not yet fitted: the choice of `python -m training.search`."""
    return ExtraTreesRegressor(n_estimators=50, min_samples_leaf=2, max_features=0.5, random_state=SEED)


def candidates() -> Iterator[Forest]:
    """Yield every model that the search compares: at most 150 trees, so that serving stays cheap."""
    for algorithm in (ExtraTreesRegressor, RandomForestRegressor):
        for trees in (50, 100, 150):
            for leaf in (1, 2, 3):
                for share in (0.3, 0.5, 0.7, 1.0):
                    yield algorithm(
                        n_estimators=trees, min_samples_leaf=leaf, max_features=share, random_state=SEED
                    )
