"""Grafana: out of reach, left out, installed, provisioned again, attacked, upgraded, gone back.

Where its maker's repository cannot be reached, a stand-in takes its place: tests/e2e/grafana/server.py.
"""

import functools
import json
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.grafana.package import VERSION, archive, package, real_one_answers, repository
from tests.e2e.site import ROOT, Site

ONLY = "tests/e2e/grafana/only.yml"
SHIPPED = {path.stem: path for path in (ROOT / "roles/grafana/files/dashboards").glob("*.json")}
NOWHERE = ["-e", "grafana_package=", "-e", "grafana_repository=https://grafana.invalid"]


def get(site: Site, path: str, password: str | None = None) -> httpx.Response:
    """Ask Grafana as administrator; without a password as nobody."""
    auth = ("admin", password) if password else None
    return site.client.get(f"http://{site.address}:3000{path}", auth=auth)


def ask(site: Site, path: str) -> Any:
    """Return what Grafana answers to its administrator."""
    answer = get(site, path, site.secret("grafana")[1])
    assert answer.status_code == 200, answer.text
    return answer.json()


def dashboards(site: Site) -> set[str]:
    """Return the uids of all dashboards."""
    return {each["uid"] for each in ask(site, "/api/search?type=dash-db")}


def await_dashboards(site: Site) -> None:
    """Wait until Grafana, which looks every ten seconds, shows what ships and nothing else."""
    deadline = time.monotonic() + 60
    while (found := dashboards(site)) != set(SHIPPED):
        assert time.monotonic() < deadline, found
        time.sleep(1)


@pytest.fixture(scope="module")
def bare(site: Site) -> Site:
    """Take Grafana away, if it is there."""
    site.run(
        "dpkg -s grafana >/dev/null 2>&1 && apt-get purge -qq grafana;"
        " rm -rf /etc/grafana /var/lib/grafana /etc/systemd/system/grafana-server.service.d"
    )
    return site


def test_where_the_repository_is_out_of_reach_nothing_is_changed_and_the_way_out_is_said(bare: Site) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        bare.play("site.yml", *NOWHERE, "-e", "winemon_unreachable=fail")
    said = str(failure.value)
    assert (
        f"{bare.name} cannot reach https://grafana.invalid, where Grafana comes from; grafana_package" in said
    )
    assert bare.changed(said) == 0


def test_grafana_can_be_left_out_and_the_rest_goes_on(bare: Site, tmp_path: Path) -> None:
    note = tmp_path / "left-out"
    skip = ["-e", "winemon_unreachable=skip", "-e", f"winemon_left_out_file={note}"]
    output = bare.play(ONLY, *NOWHERE, *skip)
    assert "It is left out." in output
    assert bare.changed(output) == 0
    assert note.read_text().startswith(f"Grafana\t{bare.name}\t{bare.name} cannot reach")
    assert bare.run("command -v /usr/share/grafana/bin/grafana || true") == ""


def test_check_mode_says_what_it_would_install(bare: Site) -> None:
    output = bare.play(ONLY, "--check")
    assert "Grafana 12." in output
    assert bare.changed(output) == 1
    assert bare.run("command -v /usr/share/grafana/bin/grafana || true") == ""


def test_grafana_is_installed_and_a_second_run_changes_nothing(bare: Site) -> None:
    assert bare.changed(bare.play(ONLY)) > 0
    assert bare.changed(bare.play(ONLY)) == 0


def test_it_shows_exactly_the_dashboards_that_ship_read_only_in_their_folder(site: Site) -> None:
    await_dashboards(site)
    for uid, path in SHIPPED.items():
        answer = ask(site, f"/api/dashboards/uid/{uid}")
        assert answer["meta"]["provisioned"]
        assert answer["meta"]["folderTitle"] == "winemon"
        assert answer["dashboard"]["panels"] == json.loads(path.read_text())["panels"]


def test_the_next_run_removes_what_does_not_ship_and_mends_what_was_changed(site: Site) -> None:
    stray = json.dumps({"uid": "stray", "title": "Stray", "schemaVersion": 36, "panels": []})
    site.run(
        f"cd /etc/grafana/dashboards && echo '{stray}' >stray.json && chgrp grafana stray.json"
        " && chmod 640 stray.json && echo '{}' >winemon-model.json"
    )
    deadline = time.monotonic() + 60
    while "stray" not in dashboards(site):
        assert time.monotonic() < deadline, "the stray dashboard does not show"
        time.sleep(1)
    assert site.changed(site.play(ONLY)) == 2
    await_dashboards(site)


def test_its_data_sources_answer_it_with_their_passwords(site: Site) -> None:
    sources = {each["uid"]: each for each in ask(site, "/api/datasources")}
    assert set(sources) == {"winemon-prometheus", "winemon-alertmanager"}
    assert sources["winemon-prometheus"]["isDefault"]
    assert all(source["readOnly"] for source in sources.values())
    assert ask(site, "/api/datasources/uid/winemon-prometheus/health")["status"] == "OK"


def test_a_password_is_asked_for_and_a_wrong_one_refused(site: Site) -> None:
    assert get(site, "/api/search").status_code == 401
    assert get(site, "/api/user", "admin").status_code == 401
    assert get(site, "/api/health").status_code == 200


def test_another_password_converges_and_so_does_the_way_back(site: Site) -> None:
    another = 'Kq$7x"W#2mV9z%4rT'
    before = site.secret("grafana")[1]
    assert site.changed(site.play(ONLY, "-e", json.dumps({"grafana_password": another}))) > 0
    assert get(site, "/api/user", another).status_code == 200
    assert get(site, "/api/user", before).status_code == 401
    assert site.changed(site.play(ONLY)) > 0
    assert get(site, "/api/user", before).status_code == 200
    logs = "".join(log.read_text() for log in site.build.glob("*.log")) + site.run("journalctl --no-pager")
    assert before not in logs


def test_it_runs_as_its_own_user_in_our_sandbox(site: Site) -> None:
    process = site.run("systemctl show --property=MainPID --value grafana-server")
    assert site.run(f"stat -c %U /proc/{process}") == "grafana"
    verdict = site.run("systemd-analyze security --no-pager grafana-server | tail -n 1")
    assert float(verdict.split(":")[1].split()[0]) <= 2.5, verdict
    readable = site.run("find /etc/grafana /var/lib/grafana -type f -perm /o=r").split()
    assert readable == []


@pytest.fixture
def mirror(site: Site, tmp_path: Path) -> Iterator[list[str]]:
    """Serve a signed repository with two versions to the machine, and yield the options that name it."""
    key = repository(["12.0.0", "12.1.0"], tmp_path / "mirror")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "mirror"))
    server = ThreadingHTTPServer((site.address.rpartition(".")[0] + ".1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://{server.server_address[0]}:{server.server_port}"
    yield ["-e", "grafana_package=", "-e", f"grafana_repository={url}", "-e", f"grafana_repository_key={key}"]
    server.shutdown()
    server.server_close()


def test_a_version_is_kept_to_also_downwards(site: Site, mirror: list[str], tmp_path: Path) -> None:
    if real_one_answers():
        pytest.skip("its versions are those of a stand-in, and the real Grafana is installed here")

    def version() -> str:
        return site.run("dpkg-query --show --showformat='${Version}' grafana")

    site.play(ONLY, "-e", f"grafana_package={archive('12.2.0', tmp_path)}")
    assert version() == "12.2.0"
    for wanted in ("12.0.0", "12.1.0", "12.0.0"):
        site.play(ONLY, *mirror, "-e", f"grafana_version={wanted}")
        assert version() == wanted
    site.run("apt-get -qq upgrade")  # which knows of 12.1.0
    assert version() == "12.0.0"
    assert site.changed(site.play(ONLY, *mirror, "-e", "grafana_version=12.0.0")) == 0
    assert ask(site, "/api/health")["version"] == "12.0.0"
    # Back to the one of the other tests, after which no repository is left to ask.
    site.play(ONLY, "-e", f"grafana_package={package(VERSION, tmp_path)}")
    assert version() == VERSION
    assert "grafana" not in site.run("ls /etc/apt/sources.list.d /etc/apt/preferences.d")
    await_dashboards(site)
