"""Checkouts of this code apart from this one, for commands that train, commit and build."""

import os
import subprocess
from pathlib import Path

from tests.e2e.site import ROOT


def git(directory: Path, *arguments: str) -> str:
    """Return what git prints, who commits as somebody else than whoever runs the tests."""
    command = ["git", "-C", str(directory), "-c", "user.name=tester", "-c", "user.email=tester@localhost"]
    return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def clone(directory: Path) -> Path:
    """Clone this checkout, with what is changed in files that git knows, as the branch main; return it.

    It has the environments of this one, which are newer than the lock files: none is built anew.
    """
    git(ROOT, "clone", "--quiet", "--shared", str(ROOT), str(directory))
    git(directory, "switch", "--quiet", "--force-create=main", git(ROOT, "stash", "create") or "HEAD")
    (directory / ".venv").symlink_to(ROOT / ".venv")
    for lock in directory.glob("requirements/*.txt"):
        os.utime(lock, (0, 0))
    return directory
