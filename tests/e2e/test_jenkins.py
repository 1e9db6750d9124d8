"""The story of Jenkins: configured before its first start, attacked, pushed to, restarted with care.

Where its maker's repository cannot be reached, this is told of a stand-in: tests/e2e/jenkins/server.py.
"""

import json
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import BUILD, ROOT, Site
from tests.e2e.jenkins.package import VERSION, package, plugins, real_one_answers

ONLY = "tests/e2e/jenkins/only.yml"
REPOSITORY = "/srv/git/winemon.git"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the variables of every run here: the public key of somebody who may push."""
    directory = tmp_path_factory.mktemp("jenkins")
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "somebody", "-f", directory / "key"]
    subprocess.run(command, check=True)
    keys = [(directory / "key.pub").read_text().strip()]
    return {"jenkins_git_authorized_keys": keys, "directory": str(directory)}


@pytest.fixture(scope="module")
def bare(site: Site) -> Site:
    """Take Jenkins away, if it is there."""
    site.run(
        "dpkg -s jenkins >/dev/null 2>&1 && apt-get purge -qq jenkins;"
        " for user in jenkins git winemon-deploy; do getent passwd $user >/dev/null && userdel $user; done;"
        " rm -rf /etc/winemon/jenkins /etc/systemd/system/jenkins.service.d /var/lib/jenkins /srv/git"
        " /var/lib/winemon-deploy /etc/sudoers.d/winemon-deploy"
    )
    return site


@pytest.fixture
def stand_in() -> None:
    """Leave out what only the stand-in can be made to show."""
    if real_one_answers():
        pytest.skip("it asks for what only the stand-in of Jenkins tells, and the real one is installed here")


def play(site: Site, given: dict[str, Any], *options: str, **changed: Any) -> str:
    """Run the role with some variables changed."""
    return site.play(ONLY, "-e", json.dumps({**given, **changed}), *options)


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


def test_check_mode_says_what_it_would_install(bare: Site, given: dict[str, Any]) -> None:
    assert f"Jenkins {VERSION}" in play(bare, given, "--check")
    assert bare.run("getent passwd jenkins git winemon-deploy || true") == ""


def test_it_is_configured_before_its_first_start_and_a_second_run_changes_nothing(
    bare: Site, given: dict[str, Any]
) -> None:
    since = bare.run("date '+%F %T'")
    assert bare.changed(play(bare, given)) > 0
    starts = f"journalctl --no-pager --output=cat -u jenkins --since '{since}' | grep -c ^Starting"
    assert bare.run(starts) == "1"
    assert [job["name"] for job in ask(bare, "/api/json")["jobs"]] == ["winemon"]
    wanted = (ROOT / "roles/jenkins/files/plugins.txt").read_text().splitlines()
    installed = {
        f"{each['shortName']}:{each['version']}"
        for each in ask(bare, "/pluginManager/api/json?depth=1")["plugins"]
    }
    assert {line for line in wanted if not line.startswith("#")} <= installed
    assert bare.changed(play(bare, given)) == 0
    assert bare.run(starts) == "1"


def test_nobody_gets_in_and_who_reads_metrics_reads_nothing_else(site: Site) -> None:
    metrics = "prometheus", (BUILD / "secrets/jenkins.metrics").read_text().strip()
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
    seen += "".join(log.read_text() for log in BUILD.glob("*.log"))
    for name in ("jenkins", "jenkins.metrics"):
        assert (BUILD / "secrets" / name).read_text().strip() not in seen
    readable = site.run(
        "find /etc/winemon/jenkins /var/lib/jenkins /srv/git -type f -perm /o=r -not -path '*/hooks/*'"
    )
    assert readable.split() == [] or "/var/lib/jenkins" not in site.run(
        "find /var/lib/jenkins -maxdepth 0 -perm /o=x"
    )


@pytest.mark.usefixtures("stand_in")
def test_a_push_is_built_within_a_minute(site: Site, given: dict[str, Any], tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", tmp_path / "code", "-c", "user.name=Somebody", "-c", "user.email=some@body"]
        return subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    first = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    site.play("ansible/jenkins-push.yml")
    await_build(site, first.stdout.strip(), 65)
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "code"], check=True)
    git("commit", "--quiet", "--allow-empty", "--message", "Change nothing")
    known = ROOT / ".machines/known_hosts"
    key = f"ssh -i {given['directory']}/key -o IdentitiesOnly=yes -o UserKnownHostsFile={known}"
    git(
        "-c",
        f"core.sshCommand={key}",
        "push",
        "--quiet",
        f"ssh://git@{site.address}{REPOSITORY}",
        "HEAD:main",
    )
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


def test_a_key_that_jenkins_does_not_know_never_reaches_it(site: Site, given: dict[str, Any]) -> None:
    before = process(site)
    with pytest.raises(pytest.fail.Exception, match=r"numExecutor\. Supported") as failure:
        play(site, given, jenkins_configuration={"jenkins": {"numExecutor": 2}})
    assert site.changed(str(failure.value)) == 0
    assert process(site) == before


@pytest.mark.usefixtures("stand_in")
def test_a_restart_waits_for_the_running_build_and_gives_up_in_the_end(
    site: Site, given: dict[str, Any]
) -> None:
    before = process(site)
    site.run("touch /var/lib/jenkins/busy")
    wanted = {"jenkins": {"numExecutors": 2}}
    with pytest.raises(pytest.fail.Exception, match="A build has run for more than 1 s"):
        play(site, given, jenkins_configuration=wanted, jenkins_restart_patience=1)
    assert process(site) == before
    assert not ask(site, "/api/json")["quietingDown"]
    # The next run, which finds the file as it should be, restarts it: when the build has ended.
    run = threading.Thread(target=play, args=(site, given), kwargs={"jenkins_configuration": wanted})
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


def test_another_password_converges_and_so_does_the_way_back(site: Site, given: dict[str, Any]) -> None:
    another, before = 'Kq$7x"W#2mV9z%4rT', site.secret("jenkins")[1]
    assert site.changed(play(site, given, jenkins_password=another)) > 0
    assert get(site, "/api/json", "admin", another).status_code == 200
    assert get(site, "/api/json", "admin", before).status_code == 401
    assert site.changed(play(site, given)) > 0
    assert ask(site, "/api/json")["numExecutors"] == 1
    assert site.changed(play(site, given)) == 0


@pytest.mark.usefixtures("stand_in")
def test_another_version_and_its_plugins_take_their_place(
    site: Site, given: dict[str, Any], tmp_path: Path
) -> None:
    site.run("echo old >/etc/winemon/jenkins/plugins.txt; touch /var/lib/jenkins/plugins/old.jpi.pinned")
    newer = str(package("2.590.1", tmp_path))
    other = str(plugins(tmp_path, "git:1.0\n"))
    with pytest.raises(pytest.fail.Exception, match=r"was made for another plugins\.txt"):
        play(site, given, jenkins_package=newer, jenkins_plugins_archive=other)
    assert get(site, "/login").headers["X-Jenkins"] == VERSION
    play(site, given, jenkins_package=newer)
    assert get(site, "/login").headers["X-Jenkins"] == "2.590.1"
    assert site.run("ls /var/lib/jenkins | grep -c plugins") == "1"
    assert "old" not in site.run("ls /var/lib/jenkins/plugins")
    play(site, given)
    assert get(site, "/login").headers["X-Jenkins"] == VERSION
