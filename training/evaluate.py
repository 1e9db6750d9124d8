"""Fitting and measuring a model."""

from typing import Final

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from training.dataset import Array, Table
from training.model import Forest

FOLDS: Final = 10
REPEATS: Final = 3
"""Times that the cross-validation is repeated, with other folds, to even out the luck of one division."""


def fit(model: Forest, table: Table) -> tuple[StandardScaler, Forest]:
    """Return a scaler and a clone of `model`, both fitted on `table`."""
    scaler = StandardScaler().fit(table.features)
    # In one thread: scikit-learn's threads disturb one another's warning filters, and gain a fifth at most.
    return scaler, clone(model).fit(scaler.transform(table.features), table.quality)


def predict(scaler: StandardScaler, model: Forest, features: Array) -> Array:
    """Return the predicted quality, shape (n,), of `features`, shape (n, 11)."""
    prediction: Array = model.predict(scaler.transform(features))
    return prediction


def mse(prediction: Array, quality: Array) -> float:
    """Return the mean squared error of predictions, both of the same shape."""
    return float(np.mean((prediction - quality) ** 2))


def out_of_fold(model: Forest, table: Table) -> Array:
    """Return cross-validated predictions, shape (REPEATS, n), each by a model that saw no equal row."""
    groups = table.groups()
    predictions = np.empty((REPEATS, len(table)))
    for repeat, prediction in enumerate(predictions):
        folds = GroupKFold(FOLDS, shuffle=True, random_state=repeat)
        for train, test in folds.split(table.features, table.quality, groups):
            prediction[test] = predict(*fit(model, table[train]), table.features[test])
    return predictions
