"""A machine with the older Debian that reaches this computer alone.

What it needs comes from a bundle, later through a proxy. Most other scenarios have the newer Debian.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import company
from tests.e2e.grafana import package as grafana
from tests.e2e.machines import machines, new_site
from tests.e2e.site import ROOT, Site

INVENTORY = Path(__file__).parent / "apart"
BASE = str(Path(__file__).parent / "company" / "base.yml")
GATEWAY = "10.213.3.1"


@pytest.fixture(scope="module")
def apart(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Build the machine, bare."""
    site = new_site(INVENTORY, ROOT / "build" / "apart")
    with machines(request.session, site, "-e", "winemon_machine_isolated=true", debian="12"):
        yield site


@pytest.fixture(scope="module")
def bundle(apart: Site) -> Path:
    """Make the bundle, with a stand-in for Grafana's package: what is told is the way of a given package."""
    given = grafana.package(grafana.VERSION, apart.build)
    output = apart.log("bundle", ["make", "--silent", "bundle", "DEBIAN=12", f"WITH={given}"])
    return ROOT / output.splitlines()[-1]


def test_it_reaches_nothing_else(apart: Site) -> None:
    assert apart.run("ip route show default; ls /var/lib/apt/lists") in ("", "lock\npartial", "partial")
    assert 'VERSION_ID="12"' in apart.run("cat /etc/os-release")


def test_a_bundle_provisions_it(apart: Site, bundle: Path) -> None:
    output = apart.play("site.yml", "-e", f"winemon_bundle={bundle}")
    assert apart.changed(output) > 0
    apart.play("ansible/verify.yml")
    lists = apart.run("ls /var/lib/apt/lists | grep -v -e lock -e partial -e auxfiles").split()
    assert lists
    assert all("winemon" in name for name in lists)
    assert apart.run("readlink /opt/winemon/current/venv").endswith("py3.11")


def test_the_bundle_again_changes_nothing(apart: Site, bundle: Path) -> None:
    assert apart.changed(apart.play("site.yml", "-e", f"winemon_bundle={bundle}")) == 0


def test_a_proxy_brings_it_packages_and_a_companys_certificate_is_trusted(apart: Site) -> None:
    alone, whole = company.certificate(GATEWAY, apart.build)
    with company.serve(GATEWAY) as (proxy, fetched), company.serve(GATEWAY, whole) as (intranet, asked):
        look = f"python3 -c 'import urllib.request as r; r.urlopen(\"{intranet}/\")'"
        assert "CERTIFICATE_VERIFY_FAILED" in apart.ssh(look).stderr
        options = {
            "winemon_http_proxy": proxy,
            "winemon_extra_ca_certificates": [str(alone)],
            "winemon_package_lists_max_age": 0,
        }
        assert apart.changed(apart.play(BASE, "-e", json.dumps(options))) > 0
        assert apart.changed(apart.play(BASE, "-e", json.dumps(options))) == 0
        apart.run("apt-get -qq install tree")
        assert any("/bookworm/InRelease" in url for url in fetched)
        assert any("/tree_" in url for url in fetched)
        asked.clear()
        apart.run(look)
        assert asked == ["/"]


def test_without_the_proxy_it_is_asked_no_more(apart: Site) -> None:
    output = apart.play(BASE, "-e", "winemon_package_lists_max_age=0")
    assert "The package mirror cannot be reached" in output
    assert "winemon" not in apart.run("ls /etc/apt/apt.conf.d /etc/apt/sources.list.d /etc/apt/preferences.d")
