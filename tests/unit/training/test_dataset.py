"""Reading data files, the tutorial's split and the frozen hold-out."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from training import dataset
from training.data.rebuild import FOLDER, rebuild
from training.dataset import CANONICAL_FILE, HOLDOUT_FILE, DataError, parse, prepare

UCI = CANONICAL_FILE.read_text()


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def kaggle(text: str) -> str:
    """Return a UCI text in the Kaggle style, with the row numbers of one of its versions."""
    header, *rows = text.replace('"', "").replace(";", ",").splitlines()
    return "\n".join([f"{header},Id", *(f"{row},{number}" for number, row in enumerate(rows))]) + "\r\n"


def with_cell(line: int, column: int, value: str) -> str:
    """Return the UCI text with one cell replaced; line 1 is the header."""
    lines = UCI.splitlines()
    cells = lines[line - 1].split(";")
    cells[column] = value
    lines[line - 1] = ";".join(cells)
    return "\n".join(lines)


def test_canonical_data_has_the_published_counts() -> None:
    data = prepare()
    assert (data.rows, data.duplicate_rows) == (1599, 240)
    assert (len(data.training), len(data.test), len(data.holdout)) == (1279, 320, 250)
    assert len(data.test) - len(data.holdout) == 70
    assert data.sha256 == dataset.CANONICAL_SHA256


def test_training_rows_are_the_tutorials() -> None:
    table = np.loadtxt(CANONICAL_FILE, delimiter=";", skiprows=1)
    train, test = train_test_split(table, test_size=0.2, random_state=1)
    data = prepare()
    assert np.array_equal(np.column_stack([data.training.features, data.training.quality]), train)
    assert np.array_equal(np.column_stack([data.test.features, data.test.quality]), test)


def test_frozen_holdout_is_the_test_rows_without_a_twin() -> None:
    data = prepare()
    trained = {tuple(row) for row in data.training.features.tolist()}
    assert not trained & {tuple(row) for row in data.holdout.features.tolist()}
    without_twin = [row for row in data.test.features.tolist() if tuple(row) not in trained]
    assert data.holdout.features.tolist() == without_twin
    assert sorted(set(data.holdout.hashes())) == HOLDOUT_FILE.read_text().split()


def test_another_file_never_trains_on_a_holdout_row(tmp_path: Path) -> None:
    rows = UCI.splitlines()
    # Reordered and doubled, it is not the canonical table, and every hold-out wine is in it.
    path = write(tmp_path / "more.csv", kaggle("\n".join([rows[0], *reversed(rows[1:]), *rows[1:]])))
    data = prepare(path)
    assert data.rows == 2 * 1599
    assert len(data.training) == 2 * (1599 - 250)
    assert not set(data.training.hashes()) & set(HOLDOUT_FILE.read_text().split())
    assert len(data.holdout) == 250


def test_canonical_table_in_the_kaggle_style_is_the_same_training_data(tmp_path: Path) -> None:
    data = prepare(write(tmp_path / "kaggle.csv", kaggle(UCI)))
    assert dataset.same(data.training, prepare().training)
    assert data.file == "kaggle.csv"
    assert data.sha256 != dataset.CANONICAL_SHA256


def test_columns_are_found_by_name_and_blank_lines_ignored() -> None:
    header, first, *_ = UCI.splitlines()
    swapped = "\n\n".join(";".join(reversed(line.split(";"))).upper() for line in (header, first)) + "\n \n"
    table = parse(Path("swapped.csv"), b"\xef\xbb\xbf" + swapped.encode())
    assert table.features.tolist() == [[7.4, 0.7, 0.0, 1.9, 0.076, 11.0, 34.0, 0.9978, 3.51, 0.56, 9.4]]
    assert table.quality.tolist() == [5.0]


def test_equal_wines_hash_equally_in_whatever_style_they_are_written() -> None:
    one = parse(Path("a"), with_cell(2, 2, "0.00").encode())
    other = parse(Path("b"), kaggle(with_cell(2, 2, "-0")).encode())
    assert one.hashes() == other.hashes()
    assert len(set(one.hashes())) == 1359


HEADER_ONLY = UCI.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "wines.csv:1: the file is empty"),
        (" \n\n", "wines.csv:1: the file is empty"),
        (HEADER_ONLY, "wines.csv:1: no rows after the header"),
        (UCI.replace('"pH"', '"acidity"'), "wines.csv:1: column 'pH': missing from the header"),
        (UCI.replace('"quality"', '"score"'), "wines.csv:1: column 'quality': missing from the header"),
        (UCI.replace('"pH"', '"alcohol"'), "wines.csv:1: column 'pH': missing from the header"),
        (UCI.replace('"pH"', '"pH";"ph"'), "wines.csv:1: column 'pH': 2 times in the header"),
        (with_cell(7, 8, "3,51"), "wines.csv:7: column 'pH': '3,51' is not a number"),
        (with_cell(7, 8, ""), "wines.csv:7: column 'pH': '' is not a number"),
        (with_cell(9, 0, "nan"), "wines.csv:9: column 'fixed acidity': nan is not a finite number"),
        (with_cell(9, 0, "1e999"), "wines.csv:9: column 'fixed acidity': 1e999 is not a finite number"),
        (with_cell(9, 0, "-1"), "wines.csv:9: column 'fixed acidity': -1 is outside 0 to 1e+06"),
        (with_cell(9, 5, "1e7"), "wines.csv:9: column 'free sulfur dioxide': 1e7 is outside 0 to 1e+06"),
        (with_cell(9, 8, "14.1"), "wines.csv:9: column 'pH': 14.1 is outside 0 to 14"),
        (with_cell(1600, 11, "11"), "wines.csv:1600: column 'quality': 11 is outside 0 to 10"),
        (with_cell(3, 11, "5;5"), "wines.csv:3: 13 fields where the header has 12"),
        (with_cell(3, 0, '"7.4" '), "wines.csv:3: ';' expected after '\"'"),
    ],
)
def test_bad_file_is_one_line_with_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as raised:
        prepare(write(tmp_path / "wines.csv", text))
    assert str(raised.value) == f"{tmp_path}/{message}"


def test_bytes_that_are_not_text_are_refused() -> None:
    with pytest.raises(DataError, match=r"wines\.csv:3: not UTF-8 text"):
        parse(Path("wines.csv"), b"a\nb\n\xff\n")


def test_too_few_wines_to_train_on(tmp_path: Path) -> None:
    lines = UCI.splitlines()
    path = write(tmp_path / "wines.csv", "\n".join([lines[0], *lines[1:21] * 5]))
    with pytest.raises(
        DataError, match=r"wines\.csv: 1\d different wines to train on without the frozen hold-out"
    ):
        prepare(path)


def test_canonical_file_that_was_touched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "CANONICAL_FILE", write(tmp_path / "red.csv", with_cell(2, 11, "6")))
    with pytest.raises(DataError, match="sha256 differs"):
        prepare()


def test_rebuild_joins_the_derived_tables_into_the_published_file(tmp_path: Path) -> None:
    rows = [line.split(";") for line in UCI.splitlines()[1:]]
    # KEEL prints every number with a decimal point.
    wines = [
        (",".join(cell if "." in cell else f"{cell}.0" for cell in row[:-1]), int(row[-1])) for row in rows
    ]
    with zipfile.ZipFile(tmp_path / "keel.whl", "w") as archive:
        for name, positive, negative in [
            ("4", {4}, {3, 5, 6, 7, 8}),
            ("3_vs_5", {3}, {5}),
            ("8_vs_6", {8}, {6}),
            ("8_vs_6-7", {8}, {6, 7}),
        ]:
            lines = [
                f"{wine},{'positive' if quality in positive else 'negative'}"
                for wine, quality in wines
                if quality in positive | negative
            ]
            archive.writestr(f"{FOLDER}winequality-red-{name}.dat", "\n".join(lines))
    assert rebuild(tmp_path / "keel.whl") == UCI
