"""Collect the wheels of a lock file for a machine's Python, so that installing them needs no internet there.

    python -m delivery.wheels LOCK PYTHON ARCHITECTURE      e.g. app 3.13 x86_64

writes build/wheels/<lock>-<first 12 hex of its hash>-py<python>-<architecture>.tar.gz, once, and prints
its path. The archive holds the wheels and `requirements.txt`: the lock's lines that hold on that Python, with
their hashes.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from delivery import archive

GLIBC_MINORS = range(17, 37)
"""Wheels for glibc 2.17 to 2.36, the one of the oldest Debian that is supported (12)."""


def run(*command: str | Path) -> None:
    """Run a command; what it prints for programs is dropped, what it says to people is not."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own tools, no shell


def target(root: Path, lock: str, python: str, architecture: str) -> Path:
    """Return where the archive for requirements/<lock>.txt is, or will be."""
    digest = archive.sha256(root / "requirements" / f"{lock}.txt")[:12]
    return root / "build" / "wheels" / f"{lock}-{digest}-py{python}-{architecture}.tar.gz"


def collect(root: Path, lock: str, python: str, architecture: str) -> Path:
    """Build the archive for requirements/<lock>.txt unless it is there, and return its path.

    Raises CalledProcessError when a package cannot be had as a wheel; pip has then said which.
    """
    collected = target(root, lock, python, architecture)
    if collected.exists():
        return collected
    requirements = root / "requirements" / f"{lock}.txt"
    # Here, so that a controller without the internet, which has the wheels from a bundle, does without.
    run("make", "--silent", "--no-print-directory", f"--directory={root}", ".venv/uv/bin/uv")
    tools = root / ".venv" / "uv" / "bin"
    with tempfile.TemporaryDirectory() as directory:
        chosen, wheels = Path(directory, "requirements.txt"), Path(directory, "wheels")
        # pip judges a lock's markers by the Python it runs on; uv by the one that is asked for.
        options = ["--no-deps", "--generate-hashes", "--no-header", "--no-annotate"]
        target_platform = [f"--python-version={python}", f"--python-platform={architecture}-manylinux_2_36"]
        run(
            tools / "uv",
            "pip",
            "compile",
            "--quiet",
            "--no-config",
            *options,
            *target_platform,
            requirements,
            f"--output-file={chosen}",
        )
        platforms = [f"--platform=manylinux_2_{minor}_{architecture}" for minor in reversed(GLIBC_MINORS)]
        platforms.append(f"--platform=manylinux2014_{architecture}")
        only = [
            "--no-deps",
            "--require-hashes",
            "--only-binary=:all:",
            "--implementation=cp",
            f"--python-version={python}",
            *platforms,
        ]
        run(
            tools / "python",
            "-m",
            "pip",
            "download",
            "--quiet",
            *only,
            f"--dest={wheels}",
            f"--requirement={chosen}",
        )
        files: dict[str, Path | bytes] = {wheel.name: wheel for wheel in wheels.iterdir()}
        archive.write(collected, {**files, "requirements.txt": chosen}, compress=False)
    return collected


def main() -> int:
    """Collect the wheels that the command line asks for."""
    parser = argparse.ArgumentParser(description="Collect the wheels of a lock file for a machine's Python.")
    parser.add_argument("lock", help="name of a file under requirements/, without .txt")
    parser.add_argument("python", help="Python of the machine, as in 3.13")
    parser.add_argument("architecture", help="of the machine, as uname -m says it")
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    try:
        collected = collect(root, arguments.lock, arguments.python, arguments.architecture)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    print(collected.relative_to(root))  # noqa: T201 - a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
