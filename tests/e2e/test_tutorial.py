"""The tutorial does what it says: its commands, as they stand, in one shell against the machine."""

import contextlib
import os
import re
import signal
import subprocess

import pytest

from tests.e2e.checkout import clone
from tests.e2e.machines import INVENTORY
from tests.e2e.site import ROOT, Site

TUTORIAL = ROOT / "docs/tutorial/1-model-monitoring.md"
FENCE = re.compile(r"^```sh\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
BLOCKS: list[tuple[str, str]] = FENCE.findall(TUTORIAL.read_text())
END = "=== end of block"


@pytest.fixture(scope="module")
def transcript(site: Site, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run every block; return what each of those printed that did not fail."""
    script, log = site.build / "tutorial.sh", site.build / "tutorial.log"
    marked = [
        f"{commands}printf '\\n%s\\n' '{END} {number}'\n" for number, (commands, _) in enumerate(BLOCKS)
    ]
    script.write_text("".join(["set -euo pipefail\n", *marked]))
    # Prometheus shows no alert before its second evaluation after a start; the reader has an older machine.
    site.eventually('ALERTS{alertname="Watchdog"}', seconds=180)
    # An environment names its place, and a clone has those of this checkout.
    subprocess.run(["make", "--silent", ".venv/app/.synced"], cwd=ROOT, check=True)
    checkout = clone(tmp_path_factory.mktemp("tutorial") / "winemon")
    with log.open("w") as file:
        shell = subprocess.Popen(
            ["bash", script],
            cwd=checkout,
            env=os.environ
            | {"INVENTORY": str(INVENTORY), "ANSIBLE_INVENTORY": str(INVENTORY), "no_proxy": "*"},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            shell.wait(timeout=400)
        finally:
            with contextlib.suppress(ProcessLookupError):  # unless it failed half-way, nothing is left
                os.killpg(shell.pid, signal.SIGTERM)
    return re.split(rf"\n{END} \d+\n", log.read_text(), flags=re.MULTILINE)


def pattern(text: str) -> str:
    """Return a regular expression for output: its numbers are examples, and `...` is anything."""
    escaped = re.escape(text.strip())
    return re.sub(r"\d+(\\\.\d+)?", r"[-+.e\\d]+", escaped.replace(r"\.\.\.", "(?s:.*)"))


@pytest.mark.parametrize(
    ("number", "output"),
    [(number, output) for number, (_, output) in enumerate(BLOCKS)],
    ids=[commands.splitlines()[0] for commands, _ in BLOCKS],
)
def test_a_command_of_the_tutorial_works(transcript: list[str], number: int, output: str) -> None:
    assert number + 1 < len(transcript), f"the shell ended here:\n{transcript[-1][-2000:]}"
    assert re.search(pattern(output), transcript[number]), transcript[number]
