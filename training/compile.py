"""Compile a fitted forest to machine code, so that serving a wine takes microseconds and no scikit-learn.

The compiled form is one more artifact, made where the model is made: machines that serve need no compiler,
and it is hashed, tested and rolled back like the rest. It answers exactly as scikit-learn does, and serving
proves that on the manifest's samples before it uses it.
"""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from training.dataset import Array
from training.model import Forest

SOURCES: Final = tuple(Path(__file__).with_name(name) for name in ("forest.c", "wines.c"))
FLAGS: Final = (
    *("-O3", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-nostdlib", "-s"),
    "-ffp-contract=off",  # one rounding for each operation, on every processor
)
NODE: Final = np.dtype([("threshold", "<f8"), ("feature", "<u4"), ("left", "<u4")])
LANES: Final = 8
"""Trees that forest.c walks at once."""


class CompileError(Exception):
    """The forest has no compiled form; the message is one line that says why."""


def compile_forest(scaler: StandardScaler, model: Forest, path: Path) -> None:
    """Write the shared library of the scaler and forest to `path`; the same model gives the same bytes.

    Raises:
        CompileError: there is no C compiler, or it fails.

    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise CompileError("no C compiler: install gcc and libc6-dev")
    tables = lay_out(scaler, model)
    nodes = tables.pop("nodes")
    # One table each, as then a comparison takes fewer instructions; a leaf's threshold is above even NaN.
    places = ordinal(nodes["threshold"]).view(np.uint64) + np.uint64(2**63)
    tables["thresholds"] = np.where(np.isinf(nodes["threshold"]), np.uint64(2**64 - 1), places)
    tables["features"] = nodes["feature"].astype(np.uint8)
    tables["left"] = nodes["left"]
    with tempfile.TemporaryDirectory() as directory:
        for name, table in tables.items():
            (Path(directory) / name).write_bytes(table.tobytes())
        # Run there, with relative names: the library must not depend on where it was made.
        trees = f"-DTREES={len(model.estimators_)}"
        command = [compiler, *FLAGS, trees, "-o", "library", *map(str, SOURCES), "-lgcc"]
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)  # noqa: S603 (fixed)
        if done.returncode:
            raise CompileError(f"{compiler}: {done.stderr.strip().splitlines()[0]}")
        shutil.copyfile(Path(directory) / "library", path)


def lay_out(scaler: StandardScaler, model: Forest) -> dict[str, NDArray[Any]]:
    """Return what forest.c evaluates: the nodes of all trees, their predictions, and the roots."""
    nodes = []
    predictions = []
    roots = []
    start = 0
    for estimator in model.estimators_:
        tree = estimator.tree_
        # Breadth first: siblings side by side, and the well-trodden nodes together.
        order = [0]
        for node in order:
            if tree.children_left[node] >= 0:
                order += [tree.children_left[node], tree.children_right[node]]
        place = np.argsort(order) + start
        left, feature, threshold = tree.children_left[order], tree.feature[order], tree.threshold[order]
        inner = left >= 0
        table = np.zeros(tree.node_count, NODE)
        table["threshold"] = np.inf
        table["threshold"][inner] = unscale(scaler, feature[inner], threshold[inner])
        table["feature"][inner] = feature[inner]
        table["left"] = np.where(inner, place[left], np.arange(start, start + tree.node_count))
        nodes.append(table)
        predictions.append(tree.value[order, 0, 0])
        roots.append(start)
        start += tree.node_count
    # A tree that is nothing but a leaf of no weight: what lanes walk that have no tree left.
    nodes.append(np.array([(np.inf, 0, start)], NODE))
    predictions.append(np.zeros(1))
    roots += [start] * (-len(roots) % LANES)
    return {
        "nodes": np.concatenate(nodes),
        "predictions": np.concatenate(predictions),
        "roots": np.array(roots, "<u4"),
    }


def edge_wines(scaler: StandardScaler, model: Forest, wine: Array) -> Array:
    """Return copies of `wine`, shape (n, 11), each with one value on a threshold of a tree or just beyond.

    Where compiled code rounds anything differently from scikit-learn, it shows on these first.
    """
    nodes = lay_out(scaler, model)["nodes"]
    wines = []
    for feature in range(len(wine)):
        thresholds = nodes["threshold"][np.isfinite(nodes["threshold"]) & (nodes["feature"] == feature)]
        for value in thresholds[:1]:
            for edge in (value, np.nextafter(value, np.inf)):
                wines.append(wine.copy())
                wines[-1][feature] = edge
    return np.array(wines).reshape(-1, len(wine))


def unscale(scaler: StandardScaler, feature: NDArray[np.int64], threshold: Array) -> Array:
    """Return, for each threshold on a scaled feature, the greatest unscaled value that does not exceed it.

    A tree compares the scaled value as float32. Scaling and rounding never change the order of two values, so
    the double where the answer changes can be found by bisection, and comparing with it is exact.
    """
    mean, scale = scaler.mean_[feature], scaler.scale_[feature]
    # Doubles in their order are integers in theirs, once the negative ones are mirrored.
    low = np.full(len(feature), ordinal(np.array(-np.finfo(float).max)))
    high = np.full(len(feature), ordinal(np.array(np.finfo(float).max)))
    with np.errstate(over="ignore"):  # what overflows float32 is greater than any threshold
        while (low < high).any():
            # Half the sum, rounded up, of two integers whose sum may overflow.
            middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
            fits = ((double(middle) - mean) / scale).astype(np.float32) <= threshold
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return double(low)


def ordinal(number: Array) -> NDArray[np.int64]:
    """Return where doubles are in the order of all doubles."""
    bits = np.ascontiguousarray(number).view(np.int64)
    return np.where(bits < 0, np.int64(-(2**63)) - bits, bits)


def double(ordinals: NDArray[np.int64]) -> Array:
    """Return the doubles at those places."""
    return np.where(ordinals < 0, np.int64(-(2**63)) - ordinals, ordinals).view(np.float64)
