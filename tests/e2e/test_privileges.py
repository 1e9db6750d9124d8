"""No user of a service leads root elsewhere: what root writes through is tried as each of them, for real."""

import re
import shlex
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest

from tests.e2e.site import Site

USERS = "prometheus grafana jenkins git winemon winemon-deploy haproxy nobody"
TEXTS = ("/var/lib/node-exporter", "/var/lib/prometheus/node-exporter")
WRITTEN = (
    f"{TEXTS[0]}/winemon-release.prom",
    "/var/lib/winemon-release/ledger.jsonl",
    *("/opt/winemon/current", "/opt/winemon/releases", "/opt/winemon/venvs", "/opt/winemon/loadtest"),
    *("/srv/winemon/releases/index.json", "/srv/git/.ssh/authorized_keys", "/srv/git/push.bundle"),
    "/var/lib/winemon-deploy/.ssh/authorized_keys",
    *("/var/lib/winemon-jenkins", "/etc/winemon/jenkins/known_hosts", "/etc/winemon/api.env"),
    *("/etc/prometheus/rules", "/etc/prometheus/secrets", "/etc/prometheus/prometheus.yml"),
    *("/etc/grafana/dashboards", "/etc/grafana/provisioning/datasources", "/etc/grafana/grafana.ini"),
    *("/usr/local/sbin/winemon-release", "/etc/sudoers.d", "/etc/systemd/system", "/var/cache/apt/archives"),
)
"""What root writes, or writes below, for winemon."""
TRY = """
for user in {users}; do
  id "$user" >/dev/null 2>&1 || continue
  for path in {paths}; do
    test -e "$path" || continue
    ! runuser -u "$user" -- test -w "$path" || echo "$user writes $path"
    runuser -u "$user" -- mv -T "$path" "$path.moved" 2>/dev/null || continue
    mv -T "$path.moved" "$path"
    echo "$user renames $path"
  done
done
"""
PLANTED = "/root/planted"


def parts(*paths: str) -> list[str]:
    """Return paths with all that leads to them, each after what it is in."""
    found = {str(each): None for path in paths for each in reversed(PurePosixPath(path).parents)}
    return [each for each in [*found, *paths] if each != "/"]


def tried(site: Site, *paths: str) -> list[str]:
    """Return which users may put something else in the place of a part of these paths."""
    return site.run(TRY.format(users=USERS, paths=shlex.join(parts(*paths)))).splitlines()


def swap(site: Site, user: str, path: str) -> bool:
    """Put a link in the place of a file or directory as a user; return whether that went."""
    attack = f"mv -T {path} {path}.moved && ln -s {PLANTED} {path}"
    return site.ssh(f"sudo runuser -u {user} -- sh -c {shlex.quote(attack)}").returncode == 0


@pytest.fixture
def planted(site: Site) -> Iterator[None]:
    """Make a directory of root's that links are to lead to; nothing there changes."""
    names = "winemon-release.prom id_ed25519.pub known_hosts authorized_keys"
    site.run(f"mkdir {PLANTED} && cd {PLANTED} && for name in {names}; do echo mine >$name; done")
    look = f"cd {PLANTED} && stat --format='%U %G %a' . && ls -lA --time-style=+%s && cat *"
    before = site.run(look)
    yield
    after = site.run(look)
    site.run(f"rm -r {PLANTED}")
    assert after == before


def test_nobody_can_replace_what_root_writes_through(site: Site) -> None:
    assert f"prometheus renames {TEXTS[1]}" in tried(site, TEXTS[1]), "it tries nothing"
    assert site.run(f"stat --format='%U %a' {TEXTS[0]}") == "root 755"
    assert tried(site, *WRITTEN) == []


@pytest.mark.usefixtures("planted")
def test_links_of_prometheus_lead_winemon_release_nowhere_and_the_exporter_reads_what_it_writes(
    site: Site,
) -> None:
    names = parts(*(f"{place}/winemon-release.prom" for place in TEXTS))
    moved = [path for path in names if swap(site, "prometheus", path)]
    try:
        assert moved, "prometheus may rename what it owns the directory of"
        refused = site.ssh("sudo winemon-release switch never-installed")
        assert refused.returncode == 2, refused.stderr
        shown = site.client.get(f"http://{site.address}:9100/metrics").text
        labels = 'action="switch",release="never-installed",result="failed"'
        assert re.search(rf"^winemon_release_step_timestamp_seconds\{{{labels}\}} ", shown, re.MULTILINE)
        assert "\nnode_textfile_scrape_error 0\n" in shown
    finally:
        for path in reversed(moved):
            site.run(f"rm {path} && mv -T {path}.moved {path}")


@pytest.fixture
def with_jenkins(site: Site) -> str:
    """Return the play of the role, where the machine has Jenkins."""
    if site.ssh("systemctl --quiet is-active jenkins").returncode:
        pytest.skip("Jenkins was left out on this machine")
    return "tests/e2e/jenkins/only.yml"


@pytest.mark.usefixtures("planted")
def test_a_link_in_the_home_of_jenkins_gives_away_and_changes_nothing(site: Site, with_jenkins: str) -> None:
    home = "/var/lib/jenkins"
    assert swap(site, "jenkins", f"{home}/.ssh")
    try:
        with pytest.raises(pytest.fail.Exception, match="Permission denied"):
            site.play(with_jenkins)
    finally:
        site.run(f"rm {home}/.ssh && mv -T {home}/.ssh.moved {home}/.ssh")
    site.run(f"cd {home}/.ssh && cp -p id_ed25519.pub pub && cat {PLANTED}/known_hosts >>id_ed25519.pub")
    try:
        with pytest.raises(pytest.fail.Exception, match="not one public key"):
            site.play(with_jenkins)
    finally:
        site.run(f"cd {home}/.ssh && mv -T pub id_ed25519.pub")


@pytest.mark.usefixtures("planted")
def test_homes_that_an_older_version_left_to_their_users_become_roots(site: Site, with_jenkins: str) -> None:
    site.run("chown winemon-deploy: /var/lib/winemon-deploy; chown -R git: /srv/git")
    assert swap(site, "winemon-deploy", "/var/lib/winemon-deploy/.ssh")
    assert swap(site, "git", "/srv/git/.ssh")
    site.play(with_jenkins)
    site.run("rm -r /var/lib/winemon-deploy/.ssh.moved /srv/git/.ssh.moved")
    assert tried(site, *WRITTEN) == []
    assert site.changed(site.play(with_jenkins)) == 0
    login = "sudo -u jenkins ssh -o BatchMode=yes"
    deployer = f"{login} winemon-deploy@{site.address} sudo -n /usr/local/sbin/winemon-release status"
    assert site.ssh(f"{deployer} </dev/null").returncode == 0
    assert site.ssh("sudo -u jenkins git ls-remote ssh://git@localhost/srv/git/winemon.git").returncode == 0
