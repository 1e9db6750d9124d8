"""Releases that differ in what a test wants, and what a machine says of those it has."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.e2e.site import Site

STORE: Final = "/srv/winemon/releases"
HEALTH: Final = 'return Liveness(status="ok")'
"""The line of app/main.py that edits change: what they say shows in the answer of /healthcheck."""

Edit = Callable[[Path], None]
Build = Callable[[Edit], Path]


def replace(file: str, old: str, new: str) -> Edit:
    """Return an edit that changes one line of one file."""

    def edit(checkout: Path) -> None:
        path = checkout / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {old}"
        path.write_text(text.replace(old, new))

    return edit


def name(built: Path) -> str:
    """Return the name of a release from its archive."""
    return built.name.removeprefix("winemon-").removesuffix(".tar.gz")


def send(site: Site, file: Path) -> str:
    """Copy a file to the machine, as its user may, and return where it is there."""
    target = f"/var/tmp/{file.name}"  # noqa: S108 - of a throw-away machine
    command = ["ssh", "-F", str(site.ssh_config), site.name, f"cat >{target}"]
    subprocess.run(command, input=file.read_bytes(), check=True)
    return target


def status(site: Site, on: str = "") -> dict[str, Any]:
    """Return what winemon-release says of a machine."""
    found: dict[str, Any] = json.loads(site.run("winemon-release status", on=on))
    return found


def ledger(site: Site) -> list[dict[str, Any]]:
    """Return what was done on the machine, the oldest first."""
    return [json.loads(line) for line in site.run("cat /var/lib/winemon-release/ledger.jsonl").splitlines()]


def index(site: Site) -> dict[str, Any]:
    """Return the index of the store."""
    found: dict[str, Any] = json.loads(site.run(f"cat {STORE}/index.json"))
    return found


def publish(site: Site, built: Path) -> str:
    """Publish a release as `make publish` does and return its name."""
    pythons = json.dumps({"winemon_api_pythons": [status(site)["python"]]})
    site.play("ansible/publish.yml", "-e", f"release={built}", "-e", pythons)
    return name(built)
