"""What a run is held to, and the JUnit file that tells a build server about it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at: its name, what was found, and what is wrong with it, if anything.

    Where it could not be looked at, `skipped` says why.
    """

    name: str
    found: str
    problem: str | None = None
    skipped: str | None = None

    @property
    def verdict(self) -> str:
        """Say in one word what came of it."""
        return "refused" if self.problem else "skipped" if self.skipped else "passed"


def write_junit(path: Path, suite: str, checks: Iterable[Check]) -> None:
    """Write the checks as the JUnit file `path`, one test case each."""
    checks = list(checks)
    attributes = {
        "name": suite,
        "tests": str(len(checks)),
        "failures": str(sum(check.problem is not None for check in checks)),
        "skipped": str(sum(check.skipped is not None for check in checks)),
    }
    root = ET.Element("testsuite", attributes)
    for check in checks:
        case = ET.SubElement(root, "testcase", classname=suite, name=check.name)
        if check.problem is not None:
            ET.SubElement(case, "failure", message=check.problem)
        elif check.skipped is not None:
            ET.SubElement(case, "skipped", message=check.skipped)
        ET.SubElement(case, "system-out").text = check.found
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)
