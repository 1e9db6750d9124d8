"""The wines: reading and checking data files, the tutorial's split and the frozen hold-out.

Two rows are equal when their eleven features are, whatever the style of the files that they come from.
"""

import csv
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from app.contract import FEATURES, TARGET, TARGET_MAXIMUM, TARGET_MINIMUM, Feature

DATA_DIR: Final = Path(__file__).parent / "data"
CANONICAL_FILE: Final = DATA_DIR / "winequality-red.csv"
CANONICAL_SHA256: Final = "4a402cf041b025d4566d954c3b9ba8635a3a8a01e039005d97d6a710278cf05e"
HOLDOUT_FILE: Final = DATA_DIR / "holdout.txt"

MINIMUM_WINES: Final = 50
"""Fewest different wines to train on: five in each of ten folds."""
LARGEST_VALUE: Final = 1e6
"""No concentration exceeds it: a litre of wine does not hold 1e6 mg of anything."""

Array = NDArray[np.float64]


class DataError(Exception):
    """A data file that cannot be trained on; the message is one line that says where and why."""


@dataclass(frozen=True, slots=True)
class Table:
    """Wines: `features`, shape (n, 11), in the contract's order and units; `quality`, shape (n,), 0 to 10."""

    features: Array
    quality: Array

    def __len__(self) -> int:
        return len(self.quality)

    def __getitem__(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> "Table":
        return Table(self.features[rows], self.quality[rows])

    def hashes(self) -> list[str]:
        """Return one hash a row, over its features alone: equal wines have equal hashes."""
        return [hashlib.sha256(repr(row).encode()).hexdigest()[:16] for row in self.features.tolist()]

    def groups(self) -> NDArray[np.intp]:
        """Return one integer a row, the same for equal wines."""
        return np.unique(self.features, axis=0, return_inverse=True)[1]

    def wines(self) -> int:
        """Return the number of different wines."""
        return len(np.unique(self.features, axis=0))


@dataclass(frozen=True, slots=True)
class Dataset:
    """What a run trains and tests on, and where it came from.

    `test` is the tutorial's test set and `holdout` its rows without a twin in the tutorial's training set,
    both from the canonical file: whatever a model is trained on, its errors are measured on the same wines.
    """

    file: str
    sha256: str
    rows: int
    duplicate_rows: int
    training: Table
    test: Table
    holdout: Table


def prepare(path: Path | None = None) -> Dataset:
    """Read `path`, or the canonical file, and set the frozen hold-out aside.

    A file that holds the canonical table, in whatever style, is split as the tutorial does; of any other, all
    rows are trained on that are not in the hold-out.

    Raises:
        DataError: the file cannot be trained on, or the canonical file is not the published one.
        OSError: a file cannot be read.

    """
    content = CANONICAL_FILE.read_bytes()
    if hashlib.sha256(content).hexdigest() != CANONICAL_SHA256:
        raise DataError(f"{CANONICAL_FILE}: not the published file (sha256 differs): restore it from git")
    canonical = parse(CANONICAL_FILE, content)
    train_rows, test_rows = train_test_split(np.arange(len(canonical)), test_size=0.2, random_state=1)
    test = canonical[test_rows]

    table = canonical
    if path is not None:
        content = path.read_bytes()
        table = parse(path, content)
    candidates = table[train_rows] if same(table, canonical) else table

    frozen = frozenset(HOLDOUT_FILE.read_text().split())
    training = candidates[np.array([row not in frozen for row in candidates.hashes()], dtype=bool)]
    if training.wines() < MINIMUM_WINES:
        raise DataError(
            f"{path}: {training.wines()} different wines to train on without the frozen hold-out, "
            f"at least {MINIMUM_WINES} are needed"
        )
    return Dataset(
        file=(path or CANONICAL_FILE).name,
        sha256=hashlib.sha256(content).hexdigest(),
        rows=len(table),
        duplicate_rows=len(table) - table.wines(),
        training=training,
        test=test,
        holdout=test[np.array([row in frozen for row in test.hashes()], dtype=bool)],
    )


def same(one: Table, other: Table) -> bool:
    """Tell whether two tables hold the same rows in the same order."""
    return np.array_equal(one.features, other.features) and np.array_equal(one.quality, other.quality)


def parse(path: Path, content: bytes) -> Table:
    """Read the wines of a file, UCI style (semicolons) or Kaggle style (commas); other columns are ignored.

    Raises:
        DataError: naming `path`, the line and the column of the first thing that is wrong.

    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text") from None
    lines = _lines(path, text)
    header_line, header = next(lines, (1, []))
    if not header:
        raise DataError(f"{path}:{header_line}: the file is empty")

    names = [name.strip().lower().replace("_", " ") for name in header]
    columns = [*FEATURES, Feature(TARGET, TARGET, "", TARGET_MINIMUM, TARGET_MAXIMUM)]
    for column in columns:
        if (count := names.count(column.column.lower())) != 1:
            problem = "missing from the header" if count == 0 else f"{count} times in the header"
            raise DataError(f"{path}:{header_line}: column '{column.column}': {problem}")
    places = [(names.index(column.column.lower()), column) for column in columns]

    rows = []
    for line, fields in lines:
        if len(fields) != len(header):
            raise DataError(f"{path}:{line}: {len(fields)} fields where the header has {len(header)}")
        try:
            rows.append([_number(fields[place], column) for place, column in places])
        except DataError as error:
            raise DataError(f"{path}:{line}: {error}") from None
    if not rows:
        raise DataError(f"{path}:{header_line}: no rows after the header")
    values = np.array(rows, dtype=np.float64)
    return Table(values[:, :-1], values[:, -1])


def _lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of each line that is not blank."""
    first = text.lstrip().partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if ";" in first else ",", strict=True)
    try:
        yield from ((reader.line_num, fields) for fields in reader if any(map(str.strip, fields)))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _number(text: str, column: Feature) -> float:
    try:
        value = float(text)
    except ValueError:
        raise DataError(f"column '{column.column}': {text.strip()!r} is not a number") from None
    if not math.isfinite(value):
        raise DataError(f"column '{column.column}': {text.strip()} is not a finite number")
    maximum = LARGEST_VALUE if column.maximum is None else column.maximum
    if not column.minimum <= value <= maximum:
        raise DataError(
            f"column '{column.column}': {text.strip()} is outside {column.minimum:g} to {maximum:g}"
        )
    return value + 0.0  # -0.0 is 0.0, also in the hash
