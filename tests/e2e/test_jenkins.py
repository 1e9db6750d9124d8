"""Jenkins: watched, attacked, pushed to, restarted with care, left out, installed again.

Where its maker's repository cannot be reached, a stand-in takes its place: tests/e2e/jenkins/server.py.
"""

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.jenkins.package import VERSION, package, plugins, real_one_answers
from tests.e2e.site import ROOT, Site

ONLY = "tests/e2e/jenkins/only.yml"
REPOSITORY = "/srv/git/winemon.git"
NOWHERE = ["-e", "jenkins_package=", "-e", "jenkins_repository=https://jenkins.invalid"]


@pytest.fixture(scope="module", autouse=True)
def provisioned(site: Site) -> None:
    """Leave this out where Jenkins was left out."""
    if site.ssh("systemctl --quiet is-active jenkins").returncode:
        pytest.skip("Debian 12 gets its Java from a repository that cannot be reached from here")


@pytest.fixture
def stand_in() -> None:
    """Leave out what only the stand-in can be made to show."""
    if real_one_answers():
        pytest.skip("it asks for what only the stand-in of Jenkins tells, and the real one is installed here")


def play(site: Site, **changed: Any) -> str:
    """Run the role with some variables changed."""
    return site.play(ONLY, "-e", json.dumps(changed))


def get(site: Site, path: str, user: str = "", password: str = "") -> httpx.Response:
    """Ask Jenkins as somebody, or as nobody."""
    auth = (user, password) if user else None
    return site.client.get(f"http://{site.address}:8080{path}", auth=auth)


def ask(site: Site, path: str) -> Any:
    """Return what Jenkins answers to its administrator."""
    answer = get(site, path, *site.secret("jenkins"))
    assert answer.status_code == 200, answer.text
    return answer.json()


def process(site: Site) -> str:
    """Return the number of its process."""
    return site.run("systemctl show --property=MainPID --value jenkins")


def await_build(site: Site, commit: str, seconds: float) -> None:
    """Wait until the newest build is that of a commit."""
    deadline = time.monotonic() + seconds
    while [build["commit"] for build in ask(site, "/job/winemon/api/json")["builds"]][-1:] != [commit]:
        assert time.monotonic() < deadline, site.run("journalctl --no-pager -n 20 -u jenkins")
        time.sleep(1)


def test_it_has_its_job_and_its_plugins(site: Site) -> None:
    assert [job["name"] for job in ask(site, "/api/json")["jobs"]] == ["winemon"]
    wanted = (ROOT / "roles/jenkins/files/plugins.txt").read_text().splitlines()
    installed = {
        f"{each['shortName']}:{each['version']}"
        for each in ask(site, "/pluginManager/api/json?depth=1")["plugins"]
    }
    assert {line for line in wanted if not line.startswith("#")} <= installed


def test_prometheus_watches_it(site: Site) -> None:
    site.eventually('up{job="jenkins"} == 1')
    found = [each["metric"] for each in site.query('default_jenkins_version_info{job="jenkins"}')]
    assert [(each["instance"], each["version"]) for each in found] == [(site.name, VERSION)]


def test_nobody_gets_in_and_who_reads_metrics_reads_nothing_else(site: Site) -> None:
    metrics = "prometheus", (site.secrets / "jenkins.metrics").read_text().strip()
    assert get(site, "/login").status_code == 200
    assert get(site, "/api/json").status_code == 403
    assert get(site, "/api/json", "admin", "admin").status_code == 401
    assert get(site, "/api/json", *metrics).status_code == 403
    assert get(site, "/prometheus/").status_code == 403
    answer = get(site, "/prometheus/", *metrics)
    assert answer.status_code == 200
    assert "\njenkins_executor_count_value 1.0\n" in answer.text
    assert f'default_jenkins_version_info{{version="{VERSION}",}}' in answer.text


def test_it_runs_as_its_own_user_in_our_sandbox_and_keeps_its_passwords_to_itself(site: Site) -> None:
    number = process(site)
    assert site.run(f"stat -c %U /proc/{number}") == "jenkins"
    verdict = site.run("systemd-analyze security --no-pager jenkins | tail -n 1")
    assert float(verdict.split(":")[1].split()[0]) <= 2, verdict
    seen = site.run(
        f"cat /proc/{number}/environ | tr '\\0' '\\n'; journalctl --no-pager; systemctl show jenkins;"
        " cat /etc/winemon/jenkins/*.yaml /etc/winemon/jenkins/*.groovy"
    )
    seen += "".join(log.read_text() for log in site.build.glob("*.log"))
    for name in ("jenkins", "jenkins.metrics"):
        assert (site.secrets / name).read_text().strip() not in seen
    readable = site.run(
        "find /etc/winemon/jenkins /var/lib/jenkins /srv/git -type f -perm /o=r -not -path '*/hooks/*'"
    )
    assert readable.split() == [] or "/var/lib/jenkins" not in site.run(
        "find /var/lib/jenkins -maxdepth 0 -perm /o=x"
    )


@pytest.mark.usefixtures("stand_in")
def test_a_push_is_built_within_a_minute(site: Site, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", tmp_path / "code", "-c", "user.name=Somebody", "-c", "user.email=some@body"]
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    machines = ROOT / ".machines"
    key = f"ssh -i {machines}/id_ed25519 -o IdentitiesOnly=yes -o UserKnownHostsFile={machines}/known_hosts"
    url = f"ssh://git@{site.address}{REPOSITORY}"
    as_git = ["git", "-c", f"core.sshCommand={key}"]
    subprocess.run([*as_git, "clone", "--quiet", "--branch=main", url, tmp_path / "code"], check=True)
    # The first build is that of what the role filled the repository with.
    await_build(site, git("rev-parse", "HEAD"), 65)
    git("commit", "--quiet", "--allow-empty", "--message", "Change nothing")
    git("-c", f"core.sshCommand={key}", "push", "--quiet", url, "HEAD:main")
    await_build(site, git("rev-parse", "HEAD"), 65)
    # What others pushed is not taken back by who has not seen it.
    with pytest.raises(pytest.fail.Exception, match="has commits that are not here"):
        site.play("ansible/jenkins-push.yml")


def test_its_one_key_fetches_and_deploys_and_does_nothing_else(site: Site) -> None:
    def as_jenkins(command: str) -> int:
        return site.ssh(f"sudo -u jenkins ssh -o BatchMode=yes {command} </dev/null").returncode

    pushed = site.ssh(
        "sudo -u jenkins git -C /var/lib/jenkins/workspace/winemon push"
        f" ssh://git@localhost{REPOSITORY} HEAD:refs/heads/other"
    )
    assert pushed.returncode != 0
    assert "other" not in site.run(f"git --git-dir={REPOSITORY} -c safe.directory='*' branch")
    deployer = f"winemon-deploy@{site.address} sudo -n"
    assert as_jenkins(f"{deployer} /usr/local/sbin/winemon-release status") == 0
    assert as_jenkins(f"{deployer} id") != 0
    assert as_jenkins(f"{deployer} /usr/bin/env /usr/local/sbin/winemon-release status") != 0


def test_a_key_that_jenkins_does_not_know_never_reaches_it(site: Site) -> None:
    before = process(site)
    with pytest.raises(pytest.fail.Exception, match=r"numExecutor\. Supported") as failure:
        play(site, jenkins_configuration={"jenkins": {"numExecutor": 2}})
    assert site.changed(str(failure.value)) == 0
    assert process(site) == before


@pytest.mark.usefixtures("stand_in")
def test_a_restart_waits_for_the_running_build_and_gives_up_in_the_end(site: Site) -> None:
    before = process(site)
    site.run("touch /var/lib/jenkins/busy")
    wanted = {"jenkins": {"numExecutors": 2}}
    with pytest.raises(pytest.fail.Exception, match="A build has run for more than 1 s"):
        play(site, jenkins_configuration=wanted, jenkins_restart_patience=1)
    assert process(site) == before
    assert not ask(site, "/api/json")["quietingDown"]
    # The next run, which finds the file as it should be, restarts it: when the build has ended.
    run = threading.Thread(target=play, args=(site,), kwargs={"jenkins_configuration": wanted})
    run.start()
    deadline = time.monotonic() + 180
    while not ask(site, "/api/json")["quietingDown"]:
        assert time.monotonic() < deadline
        time.sleep(1)
    time.sleep(5)
    assert process(site) == before
    site.run("rm /var/lib/jenkins/busy")
    run.join()
    assert process(site) != before
    assert ask(site, "/api/json")["numExecutors"] == 2


@pytest.mark.usefixtures("stand_in")
def test_another_password_version_and_plugins_take_their_place_and_so_does_what_was_before(
    site: Site, tmp_path: Path
) -> None:
    another, before = 'Kq$7x"W#2mV9z%4rT', site.secret("jenkins")[1]
    site.run("echo old >/etc/winemon/jenkins/plugins.txt; touch /var/lib/jenkins/plugins/old.jpi.pinned")
    newer = str(package("2.590.1", tmp_path))
    other = str(plugins(tmp_path, "git:1.0\n"))
    with pytest.raises(pytest.fail.Exception, match=r"was made for another plugins\.txt"):
        play(site, jenkins_package=newer, jenkins_plugins_archive=other)
    assert get(site, "/login").headers["X-Jenkins"] == VERSION
    play(site, jenkins_package=newer, jenkins_password=another)
    assert get(site, "/login").headers["X-Jenkins"] == "2.590.1"
    assert site.run("ls /var/lib/jenkins | grep -c plugins") == "1"
    assert "old" not in site.run("ls /var/lib/jenkins/plugins")
    assert get(site, "/api/json", "admin", another).status_code == 200
    assert get(site, "/api/json", "admin", before).status_code == 401
    play(site)
    assert get(site, "/login").headers["X-Jenkins"] == VERSION
    assert ask(site, "/api/json")["numExecutors"] == 1


def test_where_its_repository_is_out_of_reach_it_is_left_out_and_nothing_waits_for_it(
    site: Site, tmp_path: Path
) -> None:
    site.run(
        "systemctl stop jenkins; apt-get purge -qq jenkins;"
        " for user in jenkins git winemon-deploy; do userdel $user; done;"
        " rm -rf /etc/winemon/jenkins /etc/systemd/system/jenkins.service.d /var/lib/jenkins /srv/git"
        " /var/lib/winemon-deploy /etc/sudoers.d/winemon-deploy"
    )
    with pytest.raises(pytest.fail.Exception) as failure:
        site.play("site.yml", *NOWHERE)
    assert f"{site.name} cannot reach https://jenkins.invalid, where Jenkins comes" in str(failure.value)
    assert site.changed(str(failure.value)) == 0
    note = tmp_path / "left-out"
    skip = ["-e", "winemon_unreachable=skip", "-e", f"winemon_left_out_file={note}"]
    output = site.play("site.yml", *NOWHERE, *skip)
    assert "It is left out." in output
    assert note.read_text().startswith(f"Jenkins\t{site.name}\t{site.name} cannot reach")
    assert "jenkins" not in site.run("ls /etc/prometheus/secrets")
    site.play("ansible/verify.yml", *NOWHERE)
    with pytest.raises(pytest.fail.Exception, match="has no repository"):
        site.play("ansible/jenkins-push.yml")


def test_it_comes_when_its_repository_is_there_configured_before_its_first_start(site: Site) -> None:
    since = site.run("date '+%F %T'")
    site.play("site.yml")
    starts = f"journalctl --no-pager --output=cat -u jenkins --since '{since}' | grep -c ^Starting"
    assert site.run(starts) == "1"
    site.eventually('up{job="jenkins"} == 1')
