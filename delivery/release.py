"""Build a release: the serving code, its lock file and the trained artifacts in one archive.

    python -m delivery.release        writes build/winemon-<version>.tar.gz and prints its path

The version is git's description of the commit and the first eight hex digits of two hashes: the model's and
that of all that is in the archive. Training anew may give the same model, but with another date: that is
another release. Two builds of the same commit and artifacts are the same bytes. Nothing is trained here: no
artifacts, no release.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from app.contract import ARTIFACT_FILES, MANIFEST_FILE
from delivery import archive

CODE = "app"
LOCK = "requirements/app.txt"


class ReleaseError(Exception):
    """The release cannot be built; the message says what to do."""


def git(root: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where there is no git or no commit."""
    # Neither a repository that this directory happens to lie in nor one that a hook's environment names.
    repository = [f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        result = subprocess.run(  # noqa: S603 - fixed program, no shell
            ["git", *repository, *arguments],  # noqa: S607 - the user's own git
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def verified_artifacts(directory: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """Return the manifest of `directory` and its files, each with the hash that the manifest gives it."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST_FILE).read_bytes())
    except FileNotFoundError:
        raise ReleaseError(f"{directory}: no artifacts here; run `make train` first") from None
    listed = manifest["artifacts"]
    if missing := set(ARTIFACT_FILES) - set(listed):
        raise ReleaseError(
            f"{directory / MANIFEST_FILE}: {', '.join(sorted(missing))} is not listed; run `make train`"
        )
    for name, expected in listed.items():
        file = directory / name
        if not file.is_file() or archive.sha256(file) != expected["sha256"]:
            raise ReleaseError(
                f"{file}: not the file that {MANIFEST_FILE} vouches for; run `make train` again"
            )
    return manifest, {name: directory / name for name in (*listed, MANIFEST_FILE)}


def code_files(root: Path) -> dict[str, Path]:
    """Return the serving code and its lock file by their names in the release."""
    files = [*(root / CODE).rglob("*"), root / LOCK]
    return {
        str(file.relative_to(root)): file
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }


def build(root: Path) -> Path:
    """Build the release of the checkout `root` and return the archive's path.

    Raises ReleaseError when artifacts are missing or are not those of their manifest.
    """
    manifest, artifacts = verified_artifacts(root / "artifacts")
    files: dict[str, Path | bytes] = {
        **code_files(root),
        **{f"artifacts/{n}": p for n, p in artifacts.items()},
    }
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    description = git(root, "describe", "--always", "--dirty=-dirty", "--match=v*") or project
    commit = git(root, "rev-parse", "HEAD")
    time = int(git(root, "show", "-s", "--format=%ct", "HEAD") or 0)
    hashes = {name: archive.sha256(path) for name, path in files.items() if isinstance(path, Path)}
    model = manifest["version"].rpartition("+")[2]
    content = archive.digest(json.dumps(hashes, sort_keys=True).encode())[:8]
    version = f"{description}-{model}-{content}"
    contents = {
        "format": 1,
        "version": version,
        "commit": commit,
        "lock": hashes[LOCK],
        "model": {"version": manifest["version"], "metrics": manifest["metrics"]},
        "files": hashes,
    }
    files[MANIFEST_FILE] = (json.dumps(contents, indent=2, sort_keys=True) + "\n").encode()
    target = root / "build" / f"winemon-{version}.tar.gz"
    archive.write(target, files, time)
    return target


def main() -> int:
    """Build the release of this checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        target = build(root)
    except ReleaseError as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's message
        return 2
    print(target.relative_to(root))  # noqa: T201 - a command's answer
    return 0


if __name__ == "__main__":
    sys.exit(main())
