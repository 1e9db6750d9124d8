"""A machine as strangers on its network and users of its services find it."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.site import Site


@pytest.mark.parametrize(
    ("port", "path", "secret"),
    [
        (9090, "/api/v1/status/config", "prometheus"),
        (9093, "/api/v2/status", "alertmanager"),
        (3000, "/api/user", "grafana"),
        (8089, "/", "locust"),
    ],
)
def test_consoles_ask_for_their_generated_password(site: Site, port: int, path: str, secret: str) -> None:
    url = f"http://{site.address}:{port}{path}"
    assert site.client.get(url).status_code == 401
    assert site.client.get(url, auth=("admin", "admin")).status_code == 401
    assert site.client.get(url, auth=site.secret(secret)).status_code == 200


@contextlib.contextmanager
def stranger() -> Iterator[list[str]]:
    """Yield the start of a command that runs on another host of the machine's network."""
    name, link = "winemon-e2e-strg", "vb-e2e-strg"
    least = ["address", "02:00:00:00:00:01"]  # which the bridge would take if it had no address of its own

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    ip("netns", "add", name)
    try:
        ip("link", "add", link, *least, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", link, "master", "winemon1", "up")
        ip("-n", name, "address", "add", "10.213.1.99/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
        yield ["ip", "netns", "exec", name]
    finally:
        ip("netns", "delete", name)


def test_the_firewall_lets_strangers_reach_ssh_and_nothing_else_of_ours(site: Site) -> None:
    bridge = Path(f"/sys/class/net/{site.bridge}/address")
    before = bridge.read_text()
    reaches = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 2)"
    with stranger() as shell:
        assert bridge.read_text() == before
        result = {
            port: subprocess.run(
                [*shell, "/usr/bin/python3", "-c", reaches, site.address, str(port)],
                capture_output=True,
                check=False,
            ).returncode
            for port in (22, 3000, 5000, 8080, 8089, 9090, 9100, 9256)
        }
    assert result == {22: 0, 3000: 1, 5000: 1, 8080: 1, 8089: 1, 9090: 1, 9100: 1, 9256: 1}
    assert site.client.get(site.api("/healthcheck")).status_code == 200


def test_firewalls_of_others_are_left_alone(site: Site) -> None:
    site.run("nft add table inet theirs && systemctl restart winemon-firewall")
    site.hang_up()  # what it was told before says nothing of who may log in now
    assert "table inet theirs" in site.run("nft list tables")
    site.run("nft delete table inet theirs")


def test_our_units_are_hardened(site: Site) -> None:
    units = site.run(
        "systemctl list-units --type=service --plain --no-legend 'winemon-*' | cut -d' ' -f1"
    ).split()
    assert {"winemon-api.service", "winemon-locust.service", "winemon-locust-worker@1.service"} <= set(units)
    for unit in units:
        verdict = site.run(f"systemd-analyze security --no-pager {unit} | tail -n 1")
        assert float(verdict.split(":")[1].split()[0]) <= 2.5, verdict


def test_services_run_as_users_without_rights(site: Site) -> None:
    host = site.host()
    for unit, user in [
        ("winemon-api", "winemon"),
        ("winemon-locust", "winemon"),
        ("prometheus", "prometheus"),
    ]:
        pid = site.run(f"systemctl show --property=MainPID --value {unit}")
        process = host.process.get(pid=int(pid))
        assert process.user == user
    assert host.file("/opt/winemon/current").is_symlink
    assert host.file("/opt/winemon/current/app/main.py").user == "root"
