"""Run a pipeline on the machine as Jenkins would: as its user, in its sandbox, workspace and environment.

The commands are those of the Jenkinsfile that is checked out there, each in a unit with the settings of
jenkins.service. It does not show how Jenkins and its plugins read the same file.
"""

import re
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import yaml

from delivery.machine import transient_properties
from tests.e2e.jenkins.pipeline import Call, Stage, read
from tests.e2e.site import Site

HOME: Final = "/var/lib/jenkins"
WORKSPACE: Final = f"{HOME}/workspace/winemon"
UNIT: Final = "winemon-rehearsal"
SPECIFIERS: Final = {"%S": "/var/lib", "%C": "/var/cache", "%d": f"/run/credentials/{UNIT}.service"}
"""Those of the unit: what is given to systemd-run is taken as it stands."""
FOLLOWS: Final = {
    True: ("always", "success", "cleanup"),
    False: ("always", "failure", "unsuccessful", "cleanup"),
}
"""What of `post` follows success and failure, in the order in which Jenkins takes it."""
TELLING: Final = re.compile(
    r"^(?:Gate: |refused ).*|(?<=: )passed; .*"
    r'|\d+ requests, \d+ failed[^"]*|(?<="stderr": ")[^"]+|(?<="msg": ")(?!non-zero)[^"]+',
    re.MULTILINE,
)
"""What the transcript shows of what commands print."""
EXPAND: Final = (
    "import glob, os, sys; names = glob.glob(sys.argv[1], recursive=True);"
    " print(*filter(os.path.isfile, names), sep='\\n')"
)


@dataclass
class Build:
    """One build: what it is started with, and what came of it."""

    site: Site
    number: int
    directory: Path
    """Where its transcript, logs and reports are kept."""
    data: str = ""
    """The job's parameter."""
    environment: dict[str, str] = field(default_factory=dict)
    """Further variables, as `jenkins_environment` sets them."""
    commit: str = ""
    statuses: dict[str, int] = field(default_factory=dict)
    """The exit status of each command that ran, in order."""

    def run(self) -> "Build":
        """Check out what was pushed last and run its pipeline to the end."""
        self.directory.mkdir(parents=True)
        self.started = time.time()
        self.say(f"Build {self.number} of winemon, DATA={shlex.quote(self.data)}")
        for name, value in self.environment.items():
            self.say(f"{name}={value} (set by this rehearsal)")
        unit = self.site.run("systemctl cat jenkins.service")
        for specifier, path in SPECIFIERS.items():
            unit = unit.replace(specifier, path)
        own = ["StateDirectory=jenkins", "StateDirectoryMode=0750"]
        self.properties = [*transient_properties(unit), *own]
        self.variables = self.own_variables()
        self.check_out()
        for stage in read(self.site.run(f"cat {WORKSPACE}/Jenkinsfile")).stages:
            self.stage(stage)
        self.say("Finished: " + ("SUCCESS" if self.succeeds else "FAILURE"))
        return self

    @property
    def succeeds(self) -> bool:
        """Whether nothing has failed so far."""
        return not any(self.statuses.values())

    def say(self, line: str) -> None:
        """Add a line to the transcript."""
        with (self.directory / "transcript.txt").open("a") as file:
            file.write(line + "\n")

    def log(self, name: str) -> Path:
        """Return where the output of a command is."""
        return self.directory / f"{name.lower().replace(' ', '-')}.log"

    def own_variables(self) -> dict[str, str]:
        """Return the environment of a build: Jenkins' own, the configuration's, the parameter."""
        configuration = yaml.safe_load(self.site.run("cat /etc/winemon/jenkins/jenkins.yaml"))
        configured = {
            variable["key"]: variable["value"]
            for properties in configuration["jenkins"]["globalNodeProperties"]
            for variable in properties["envVars"]["env"]
        }
        return {
            "CI": "true",
            "NODE_NAME": "built-in",
            "EXECUTOR_NUMBER": "0",
            "JENKINS_URL": configuration["unclassified"]["location"]["url"],
            "JOB_NAME": "winemon",
            "JOB_BASE_NAME": "winemon",
            "BUILD_NUMBER": str(self.number),
            "BUILD_ID": str(self.number),
            "BUILD_DISPLAY_NAME": f"#{self.number}",
            "BUILD_TAG": f"jenkins-winemon-{self.number}",
            "WORKSPACE": WORKSPACE,
            "WORKSPACE_TMP": f"{WORKSPACE}@tmp",
            **configured,
            **self.environment,
            "DATA": self.data,
        }

    def execute(self, name: str, command: str, directory: str) -> int:
        """Run a command as a step of Jenkins does, keep its output, and return its exit status."""
        unit = ["systemd-run", "--quiet", "--collect", "--wait", "--pipe", f"--unit={UNIT}"]
        unit += [f"--property={line}" for line in [*self.properties, f"WorkingDirectory={directory}"]]
        unit += [f"--setenv={key}={value}" for key, value in self.variables.items()]
        # One pipe, as in Jenkins: no line that the shell traces gets into one that the command prints.
        remote = shlex.join(["sudo", *unit, "--", "sh", "-c", 'exec sh -xe -c "$0" 2>&1', command])
        with self.log(name).open("w") as file:
            call = ["ssh", "-F", str(self.site.ssh_config), self.site.name, remote]
            return subprocess.run(call, stdout=file, stderr=subprocess.STDOUT, check=False).returncode

    def check_out(self) -> None:
        """Fetch the job's branch with Jenkins' key, from a host that Jenkins knows, as its git does."""
        job = self.site.run("cat /etc/winemon/jenkins/jobs.groovy")
        found = re.search(r"remote \{ url\('(.+)'\) \}\s+branch\('(.+)'\)", job)
        assert found, job
        url, branch = found.groups()
        git = "git -c core.sshCommand='ssh -o BatchMode=yes -o StrictHostKeyChecking=yes'"
        commands = (
            f"mkdir -p {WORKSPACE}; cd {WORKSPACE}; git init --quiet;"
            f" {git} fetch --quiet --tags --force {url} '+refs/heads/*:refs/remotes/origin/*';"
            f" git checkout --quiet --force --detach origin/{branch}; git rev-parse HEAD"
        )
        status = self.execute("Check out", commands, HOME)
        output = self.log("Check out").read_text()
        assert status == 0, output
        (self.commit,) = re.findall(r"^[0-9a-f]{40}$", output, re.MULTILINE)
        self.variables |= {"GIT_URL": url, "GIT_BRANCH": f"origin/{branch}", "GIT_COMMIT": self.commit}
        self.say(f"commit {self.commit[:12]}")

    def stage(self, stage: Stage) -> None:
        """Run a stage and what follows it; where something has failed, it is skipped."""
        if not self.succeeds:
            self.say(f"       {stage.name}: skipped")
            return
        if stage.command:
            self.command(stage.name, stage.command)
        for inner in stage.stages:
            self.stage(inner)
        for condition in FOLLOWS[self.succeeds]:
            for step in stage.post.get(condition, ()):
                if step.name == "sh":
                    self.command(f"{stage.name}, {condition}", str(step.arguments[0]))
                else:
                    self.keep(step)

    def command(self, name: str, command: str) -> None:
        """Run the command of a stage, or of what follows it."""
        start = time.monotonic()
        self.statuses[name] = status = self.execute(name, command, WORKSPACE)
        result = f"failed ({status})" if status else "ok"
        self.say(f"{time.monotonic() - start:4.0f} s {name}: {command}: {result}")
        for line in TELLING.findall(self.log(name).read_text()):
            self.say(f"         {line}")

    def keep(self, step: Call) -> None:
        """Keep reports: all of this build, and with tests that are as good as its commands were."""
        pattern = str(step.keywords["testResults" if step.name == "junit" else "artifacts"])
        expand = shlex.join(["python3", "-c", EXPAND, pattern])
        names = self.site.run(f"cd {WORKSPACE} && {expand}").split()
        if names:
            pack = ["ssh", "-F", str(self.site.ssh_config), self.site.name]
            packed = subprocess.run(
                [*pack, shlex.join(["sudo", "tar", "-C", WORKSPACE, "-c", *names])],
                capture_output=True,
                check=True,
            ).stdout
            subprocess.run(["tar", "-x", "-C", self.directory], input=packed, check=True)
        kept = [self.directory / name for name in names]
        assert all(path.stat().st_mtime >= self.started for path in kept), f"{pattern} is of an earlier build"
        may_lack = "allowEmptyResults" if step.name == "junit" else "allowEmptyArchive"
        assert kept or step.keywords.get(may_lack), f"no {pattern}"
        found = f"{len(kept)} files"
        if step.name == "junit":
            roots = [ElementTree.parse(path).getroot() for path in kept]  # noqa: S314 - our own
            cases = [case for root in roots for case in root.iter("testcase")]
            bad = [case for case in cases if any(child.tag in {"failure", "error"} for child in case)]
            assert not (bad and self.succeeds), "a build whose commands went well would be unstable"
            found = f"{len(cases)} tests, {len(bad)} failed"
        self.say(f"       {step.name} {pattern}: {found}")
