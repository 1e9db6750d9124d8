"""Build the stand-in for Grafana in the forms that its maker has: package, archive and signed repository."""

import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import yaml

REPOSITORY: Final = "https://apt.grafana.com"
DEFAULTS: Final = Path(__file__).parents[3] / "roles/grafana/defaults/main.yml"
VERSION: Final[str] = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))["grafana_version"]
"""The version that the role wants."""
SERVER: Final = Path(__file__).with_name("server.py")

CONTROL: Final = """\
Package: grafana
Version: {version}
Architecture: all
Maintainer: winemon <root@localhost>
Depends: adduser, python3, python3-yaml
Description: stand-in for Grafana in winemon's tests
"""
DEFAULT: Final = """\
CONF_FILE=/etc/grafana/grafana.ini
DATA_DIR=/var/lib/grafana
LOG_DIR=/var/log/grafana
PLUGINS_DIR=/var/lib/grafana/plugins
PROVISIONING_CFG_DIR=/etc/grafana/provisioning
PID_FILE_DIR=/run/grafana
"""
UNIT: Final = """\
[Unit]
Description=Stand-in for Grafana
After=network-online.target
Wants=network-online.target

[Service]
EnvironmentFile=/etc/default/grafana-server
User=grafana
Group=grafana
Type=simple
Restart=on-failure
WorkingDirectory=/usr/share/grafana
RuntimeDirectory=grafana
RuntimeDirectoryMode=0750
ExecStart=/usr/share/grafana/bin/grafana server --config=${CONF_FILE} \\
  --pidfile=${PID_FILE_DIR}/grafana-server.pid --packaging=deb \\
  cfg:default.paths.logs=${LOG_DIR} cfg:default.paths.data=${DATA_DIR} \\
  cfg:default.paths.plugins=${PLUGINS_DIR} cfg:default.paths.provisioning=${PROVISIONING_CFG_DIR}
UMask=0027

[Install]
WantedBy=multi-user.target
"""
# Like its maker's: it takes /etc/grafana for itself, starts nothing at first, and restarts what ran before.
POSTINST: Final = """\
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
adduser --quiet --system --group --home /usr/share/grafana --no-create-home --shell /bin/false grafana
install -d -o grafana -g grafana /var/lib/grafana /var/log/grafana
for kind in dashboards datasources; do
  directory=/etc/grafana/provisioning/$kind
  [ -d $directory ] || install -D -m 0640 /dev/null $directory/sample.yaml
done
[ -f /etc/grafana/grafana.ini ] || echo '# empty' >/etc/grafana/grafana.ini
chown -Rh root:grafana /etc/grafana/*
find /etc/grafana -type f -exec chmod 640 {} ';'
find /etc/grafana -type d -exec chmod 755 {} ';'
systemctl daemon-reload
[ -z "$2" ] || systemctl restart grafana-server
"""


def home(directory: Path, version: str) -> None:
    """Write what is /usr/share/grafana."""
    (directory / "bin").mkdir(parents=True)
    shutil.copy(SERVER, directory / "bin" / "grafana")
    (directory / "bin" / "grafana").chmod(0o755)
    (directory / "VERSION").write_text(f"{version}\n")


def package(version: str, directory: Path) -> Path:
    """Build the Debian package of a version in a directory and return its path."""
    path = directory / f"grafana_{version}_all.deb"
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary, "tree")
        home(tree / "usr/share/grafana", version)
        for name, text, mode in [
            ("DEBIAN/control", CONTROL.format(version=version), 0o644),
            ("DEBIAN/postinst", POSTINST, 0o755),
            ("etc/default/grafana-server", DEFAULT, 0o644),
            ("usr/lib/systemd/system/grafana-server.service", UNIT, 0o644),
        ]:
            file = tree / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(mode)
        command = ["dpkg-deb", "--build", "--root-owner-group", "-Znone", tree, path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def archive(version: str, directory: Path) -> Path:
    """Build the archive of a version in a directory and return its path."""
    path = directory / f"grafana-{version}.linux-amd64.tar.gz"
    with tempfile.TemporaryDirectory() as temporary:
        home(Path(temporary, f"grafana-{version}"), version)
        subprocess.run(["tar", "-czf", path, "-C", temporary, f"grafana-{version}"], check=True)
    return path


def repository(versions: Iterable[str], directory: Path) -> Path:
    """Build a repository of some versions in a directory, signed, and return the path of its key."""
    suite, binary = directory / "dists" / "stable", "main/binary-amd64/Packages"
    (suite / binary).parent.mkdir(parents=True)
    entries = []
    for version in versions:
        path = package(version, directory)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        place = f"Filename: {path.name}\nSize: {path.stat().st_size}\nSHA256: {digest}\n"
        entries.append(CONTROL.format(version=version) + place)
    packages = "\n".join(entries).encode()
    (suite / binary).write_bytes(packages)
    release = directory / "Release"
    release.write_text(
        "Suite: stable\nComponents: main\nArchitectures: amd64\n"
        f"SHA256:\n {hashlib.sha256(packages).hexdigest()} {len(packages)} {binary}\n"
    )
    key = directory / "key.asc"
    with tempfile.TemporaryDirectory() as keyring:
        gpg = ["gpg", "--homedir", keyring, "--batch", "--quiet", "--passphrase", "", "--yes"]
        subprocess.run([*gpg, "--quick-generate-key", "winemon tests"], check=True, capture_output=True)
        subprocess.run([*gpg, "--armor", "--output", key, "--export"], check=True)
        subprocess.run([*gpg, "--output", suite / "InRelease", "--clearsign", release], check=True)
        subprocess.run(["gpgconf", "--kill", "all"], env={**os.environ, "GNUPGHOME": keyring}, check=True)
    return key


def real_one_answers() -> bool:
    """Return whether Grafana's own repository can be reached, which then needs no stand-in."""
    try:
        with urllib.request.urlopen(f"{REPOSITORY}/dists/stable/InRelease", timeout=5):  # noqa: S310 - https
            return True
    except OSError:
        return False
