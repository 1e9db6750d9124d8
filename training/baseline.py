"""The baseline of drift detection: which values the model was trained on, as quantile bins and their shares.

`baseline.json` reads

    {"id": "1f0c9a3b",
     "features": {"fixed_acidity": {"edges": [4.6, 6.5, ..., 15.9], "shares": [0.098, ...]}, ...},
     "quality":  {"edges": [...], "shares": [...]}}

`features` has every feature of the contract, in its order, from the training rows. `quality` is the output:
its bins come from grouped out-of-fold predictions, never from labels (an honest regression is narrower than
its labels, so against labels it would look drifted for ever). `id` is the first eight hex digits of the
SHA-256 over the rest, so that a window of counts across a retraining never mixes two baselines.

With k + 1 `edges` there are k bins, and k `shares` that sum to 1. Edges rise strictly, the first is the
smallest training value and the last is the largest; tied quantiles collapse, so k is 10 or fewer (a constant
column has one bin between two equal edges). Bins are named by their index, "0" to "9", also their order on a
dashboard:

- bin i holds edges[i] <= value < edges[i + 1];
- the last bin holds its upper edge too: edges[k - 1] <= value <= edges[k];
- a value under edges[0] belongs to the bin `below`, one over edges[k] to `above`: outside the training range,
  expected share 0, so they are not listed here.

That is, within the range, index = min(bisect_right(edges, value) - 1, k - 1).
"""

import hashlib
import json
from typing import Any, Final

import numpy as np

from app.contract import FEATURE_NAMES, TARGET
from training.dataset import Array

BINS: Final = 10


def make_baseline(features: Array, predictions: Array) -> dict[str, Any]:
    """Return the baseline of training rows, shape (n, 11), and out-of-fold predictions, of any shape."""
    content = {
        "features": {name: _bins(column) for name, column in zip(FEATURE_NAMES, features.T, strict=True)},
        TARGET: _bins(predictions.ravel()),
    }
    return {"id": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8], **content}


def _bins(values: Array) -> dict[str, list[float]]:
    # Edges are values that occur, so that no bin is empty.
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1), method="inverted_cdf"))
    if len(edges) == 1:
        edges = np.repeat(edges, 2)
    counts, _ = np.histogram(values, edges)
    return {"edges": edges.tolist(), "shares": (counts / len(values)).tolist()}
