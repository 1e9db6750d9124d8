"""Build the stand-in for Jenkins as its maker ships it, and an archive as of `make jenkins-plugins`."""

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import Final

import yaml

SERVER: Final = Path(__file__).with_name("server.py")
PROBE: Final = Path(__file__).with_name("Probe.java")
ROLE: Final = Path(__file__).parents[3] / "roles/jenkins"
PLUGINS: Final = ROLE / "files/plugins.txt"
DEFAULTS: Final = ROLE / "defaults/main.yml"
VERSION: Final[str] = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["jenkins_version"]
"""The version that the role wants."""

CONTROL: Final = """\
Package: jenkins
Version: {version}
Architecture: all
Maintainer: winemon <root@localhost>
Depends: adduser, python3, python3-yaml
Description: stand-in for Jenkins in winemon's tests
"""
UNIT: Final = """\
[Unit]
Description=Stand-in for Jenkins
Requires=network.target
After=network.target
StartLimitBurst=5
StartLimitIntervalSec=5m

[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/bin/jenkins
Restart=on-failure
SuccessExitStatus=143
User=jenkins
Group=jenkins
Environment="JENKINS_HOME=%S/jenkins"
WorkingDirectory=%S/jenkins
Environment="JENKINS_WEBROOT=%C/jenkins/war"
Environment="JAVA_OPTS=-Djava.awt.headless=true"
Environment="JENKINS_PORT=8080"

[Install]
WantedBy=multi-user.target
"""
# Like its maker's with what debhelper adds: it starts at once, and restarts after an upgrade.
POSTINST: Final = """\
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
id jenkins >/dev/null 2>&1 ||
  adduser --quiet --system --group --home /var/lib/jenkins --shell /bin/bash jenkins
install -d -o jenkins -g jenkins /var/lib/jenkins /var/cache/jenkins
deb-systemd-helper enable jenkins.service >/dev/null
systemctl daemon-reload
action=start
[ -z "$2" ] || action=restart
deb-systemd-invoke $action jenkins.service >/dev/null || true
"""


def package(version: str, directory: Path) -> Path:
    """Build the Debian package of a version in a directory and return its path."""
    path = directory / f"jenkins_{version}_all.deb"
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary, "tree")
        for name, text, mode in [
            ("DEBIAN/control", CONTROL.format(version=version), 0o644),
            ("DEBIAN/postinst", POSTINST, 0o755),
            ("usr/lib/systemd/system/jenkins.service", UNIT, 0o644),
            ("usr/share/java/jenkins.war", f"{version}\n", 0o644),
            ("usr/share/java/Probe.java", PROBE.read_text(), 0o644),
        ]:
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(mode)
        (tree / "usr/bin").mkdir()
        shutil.copy(SERVER, tree / "usr/bin/jenkins")
        (tree / "usr/bin/jenkins").chmod(0o755)
        command = ["dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def plugins(directory: Path, wanted: str | None = None) -> Path:
    """Write an archive of empty plugins, named as plugins.txt or another text says, and return its path."""
    text = wanted if wanted is not None else PLUGINS.read_text()
    files: dict[str, bytes] = {"plugins.txt": text.encode()}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(":")
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as archive:
                manifest = f"Manifest-Version: 1.0\nShort-Name: {name}\nPlugin-Version: {version}\n"
                archive.writestr("META-INF/MANIFEST.MF", manifest)
            files[f"{name}.jpi"] = content.getvalue()
    sums = "".join(f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    files["SHA256SUMS"] = sums.encode()
    path = directory / "jenkins-plugins.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in sorted(files.items()):
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def real_one_answers() -> bool:
    """Return whether the repository of Jenkins' maker can be reached, so that no stand-in is needed."""
    request = urllib.request.Request("https://pkg.jenkins.io/debian-stable/binary/Release", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=5):  # noqa: S310 - https, as it says above
            return True
    except OSError:
        return False
