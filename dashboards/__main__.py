"""Write the dashboards' JSON: `python -m dashboards`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from dashboards import jenkins, loadtest, machines, model
from monitoring.rules import SOURCE, Source, read

OUTPUT: Final = Path(__file__).parents[1] / "roles/grafana/files/dashboards"


def build(source: Source) -> dict[str, str]:
    """Return the files by name, which is the dashboard's uid."""
    dashboards = [module.build(source) for module in (model, jenkins, machines, loadtest)]
    return {
        f"{each['uid']}.json": json.dumps(each, indent=1, ensure_ascii=False) + "\n" for each in dashboards
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write them, and remove what is no longer built; return 2 after saying in one line why not."""
    parser = argparse.ArgumentParser(description="Build Grafana's dashboards.")
    parser.add_argument("--source", type=Path, default=SOURCE, help="the objectives, by default %(default)s")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="the directory to write to, by default %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        files = build(read(options.source))
        options.output.mkdir(parents=True, exist_ok=True)
        for path in set(options.output.glob("*.json")) - {options.output / name for name in files}:
            path.unlink()
        for name, text in files.items():
            (options.output / name).write_text(text)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - the command's own output
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
