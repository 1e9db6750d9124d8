"""A machine with Debian 12 that the version before this one provisioned: forth, and back."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.schemas import EXAMPLE
from tests.e2e.machines import machines, new_site
from tests.e2e.site import ROOT, Site

INVENTORY = Path(__file__).parent / "upgrade"
BEFORE_TAGS = "b23b576"  # as long as no version has a tag
SERVED = 'sum(fastapi_monitoring_http_requests_total{handler="/predict", status="2xx"})'


@pytest.fixture(scope="module")
def elder(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Build the machine, bare."""
    if git(ROOT, "rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("this clone has no other version: git fetch --unshallow")
    site = new_site(INVENTORY, ROOT / "build" / "upgrade")
    with machines(request.session, site, debian="12"):
        # Passwords are beside it.
        site.inventory = Path(shutil.copytree(INVENTORY, site.build / "inventory"))
        yield site


def git(checkout: Path, *arguments: str, check: bool = True) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, check=check, capture_output=True, text=True).stdout.strip()


class Version:
    """The checkout of another version, and its plays."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.checkout = site.build / "winemon"
        git(ROOT, "clone", "--quiet", str(ROOT), str(self.checkout))
        tag = git(self.checkout, "describe", "--tags", "--abbrev=0", "--match=v*", "HEAD^", check=False)
        git(self.checkout, "checkout", "--quiet", "--detach", tag or BEFORE_TAGS)
        self.run("make", "make", "--silent", ".venv/ansible/.synced")
        moved = (self.checkout / "ansible/passwords.yml").exists()
        self.secrets = site.inventory / (".secrets" if moved else "secrets")

    def run(self, name: str, *command: str) -> str:
        """Run a command in it."""
        return self.site.log(f"before-{name}", ["env", f"--chdir={self.checkout}", *command])

    def play(self, playbook: str) -> str:
        """Run a playbook of it."""
        ansible = str(self.checkout / ".venv/ansible/bin/ansible-playbook")
        return self.run(Path(playbook).stem, ansible, "-i", str(self.site.inventory), playbook)


@pytest.fixture(scope="module")
def before(elder: Site) -> Version:
    return Version(elder)


def live(site: Site) -> str:
    return site.run("readlink /opt/winemon/current").rpartition("/")[2]


def secrets(site: Site) -> dict[str, str]:
    return {path.name: path.read_text() for path in site.secrets.iterdir()}


def give_back_passwords(site: Site, before: Version) -> None:
    """Run the command that docs/operations.md has for the version before, if it looks for them elsewhere."""
    (command,) = re.findall("^mv .*", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    if site.secrets != before.secrets:
        here = command.replace("inventory/local", str(site.inventory))
        site.log("passwords", shlex.split(here, comments=True))
        site.secrets = before.secrets


def test_the_version_before_provisions_it(elder: Site, before: Version) -> None:
    elder.secrets = before.secrets
    before.play("site.yml")
    before.play("ansible/verify.yml")
    for _ in range(5):
        assert elder.client.post(elder.api("/predict"), json=EXAMPLE).status_code == 200
    elder.eventually(f"{SERVED} >= 5")


def test_this_version_takes_it_over_with_all_it_has(elder: Site) -> None:
    release, known, served = live(elder), secrets(elder), elder.eventually(SERVED)
    elder.play("site.yml")
    elder.secrets = elder.inventory / ".secrets"
    elder.play("ansible/verify.yml")
    assert elder.changed(elder.play("site.yml")) == 0
    assert live(elder) == release
    assert secrets(elder).items() >= known.items()
    assert not (elder.inventory / "secrets").exists()
    assert elder.eventually(f"max_over_time({SERVED}[30m:10s])") >= served


def test_this_versions_release_is_deployed(elder: Site) -> None:
    release = live(elder)
    built = elder.log("release", ["make", "--silent", "release"]).splitlines()[-1]
    elder.play("ansible/publish.yml", "-e", f"release={ROOT / built}")
    elder.play("ansible/deploy.yml")
    assert live(elder) != release
    elder.play("ansible/verify.yml")


def test_the_version_before_takes_it_back(elder: Site, before: Version) -> None:
    release, known = live(elder), secrets(elder)
    elder.play("ansible/rollback.yml")
    assert live(elder) != release
    give_back_passwords(elder, before)
    before.play("site.yml")
    before.play("ansible/verify.yml")
    assert elder.changed(before.play("site.yml")) == 0
    assert secrets(elder) == known
