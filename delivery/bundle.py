"""Collect what machines of one Debian release take from the internet, for machines that have none.

    python -m delivery.bundle build DEBIAN [FILE...]

writes build/winemon-bundle-<release>-debian-<number>-<architecture>.tar.gz and prints its path. It holds the
release, the wheels of its locks and of Locust's, and a repository of the Debian packages that the roles
install, with all that these need. FILE is what Debian does not have: Grafana's and Jenkins' packages, a Java
for it, and the archive of its plugins.

    python -m delivery.bundle unpack FILE

verifies every file against the hashes in the bundle, lays them down under build/bundles/, and prints as JSON
where the release is, and where a file of variables for the machines.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from delivery import archive, release, wheels

PYTHONS: Final = {"12": "3.11", "13": "3.13"}
SUITES: Final = {"12": "bookworm", "13": "trixie"}
ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}
LOCKS: Final = ("app", "loadtest")
KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
APT: Final = ("apt", "ansible.builtin.apt")
GIVEN: Final = {
    r"grafana_.*\.deb": "grafana_package",
    r"jenkins_.*\.deb": "jenkins_package",
    r"(temurin|openjdk)-.*\.deb": "jenkins_java_package",
    r"jenkins-plugins.*\.tar\.gz": "jenkins_plugins_archive",
}
"""What the names of given files say they are for: the variables of the roles."""


class BundleError(Exception):
    """The bundle cannot be made or used; the message says what to do."""


def tasks(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the tasks of a file of a role, also those in blocks."""
    for entry in entries:
        yield entry
        for part in ("block", "rescue", "always"):
            yield from tasks(entry.get(part) or [])


def packages(root: Path, roles: set[str]) -> set[str]:
    """Return the Debian packages that these roles install, as their tasks name them.

    A template counts for the role's variables in it that are lists; `name={{ version }}` is a package that
    Debian does not have.
    """
    found = set()
    for role in roles:
        defined = root / "roles" / role / "vars/main.yml"
        variables = yaml.safe_load(defined.read_bytes()) if defined.exists() else {}
        for file in sorted((root / "roles" / role / "tasks").glob("*.yml")):
            for task in tasks(yaml.safe_load(file.read_bytes()) or []):
                options: dict[str, Any] = next((task[module] for module in APT if module in task), {})
                names = options.get("name", [])
                for name in [names] if isinstance(names, str) else names:
                    if "{{" not in name:
                        found.add(name)
                        continue
                    lists = [variables.get(word) for word in re.findall(r"\w+", name)]
                    found.update(*(value for value in lists if isinstance(value, list)))
    return found


def variable(path: Path) -> str:
    """Return the variable that says where a given file is."""
    for pattern, name in GIVEN.items():
        if re.fullmatch(pattern, path.name):
            return name
    raise BundleError(
        f"{path.name}: a bundle takes grafana_*.deb, jenkins_*.deb, temurin-*.deb or openjdk-*.deb, and "
        "jenkins-plugins*.tar.gz"
    )


def repository(directory: Path, debian: str, architecture: str, wanted: list[str]) -> Path:
    """Download packages with all that they need, and return an archive of them that apt can read.

    `wanted` are names of packages, and paths of packages whose needs are meant.
    """
    state, cache, pool = (directory / name for name in ("state", "cache", "repository"))
    for folder in (state / "lists/partial", cache / "archives/partial", pool):
        folder.mkdir(parents=True)
    mirror = os.environ.get("WINEMON_DEBIAN_MIRROR") or "http://deb.debian.org/debian"
    security = os.environ.get("WINEMON_DEBIAN_SECURITY_MIRROR") or "http://deb.debian.org/debian-security"
    suite, signed = SUITES[debian], f"[signed-by={KEYRING}]"
    sources = directory / "sources.list"
    sources.write_text(
        f"deb {signed} {mirror} {suite} main\ndeb {signed} {mirror} {suite}-updates main\n"
        f"deb {signed} {security} {suite}-security main\n"
    )
    # Nothing counts as installed: whatever a machine has of it, in whichever version, all fits together.
    status = directory / "status"
    status.touch()
    options = {
        "APT::Architecture": ARCHITECTURES[architecture],
        "APT::Architectures": ARCHITECTURES[architecture],
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Dir::State": state,
        "Dir::State::status": status,
        "Dir::Cache": cache,
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
    }
    apt = ["apt-get", "--quiet", "--quiet", *(f"--option={name}={value}" for name, value in options.items())]
    wheels.run(*apt, "update")
    wheels.run(*apt, "--yes", "--download-only", "install", *sorted(wanted))
    for package in (cache / "archives").glob("*.deb"):
        # apt would decode the %3a of an epoch where it looks for the file.
        package.rename(pool / re.sub(r"_\d+%3a", "_", package.name))
    index = subprocess.run(
        ["apt-ftparchive", "packages", "."],  # noqa: S607 - Debian's
        cwd=pool,
        check=True,
        capture_output=True,
    ).stdout
    (pool / "Packages").write_bytes(index)
    told = subprocess.run(
        ["apt-ftparchive", "--option=APT::FTPArchive::Release::Origin=winemon", "release", "."],  # noqa: S607
        cwd=pool,
        check=True,
        capture_output=True,
    ).stdout
    (pool / "Release").write_bytes(told)
    target = directory / f"debian-{debian}-{architecture}-{archive.digest(index)[:12]}.tar.gz"
    archive.write(target, {file.name: file for file in pool.iterdir()}, compress=False)
    return target


def build(root: Path, debian: str, given: list[Path]) -> Path:
    """Build the bundle for machines like this computer, and return its path."""
    architecture = platform.machine()
    if debian not in SUITES or architecture not in ARCHITECTURES:
        raise BundleError(
            f"Debian {debian} on {architecture}: winemon knows Debian {' and '.join(SUITES)} on "
            f"{' and '.join(ARCHITECTURES)}"
        )
    variables = {variable(path): path.name for path in given}
    if missing := [str(path) for path in given if not path.is_file()]:
        raise BundleError(f"{', '.join(missing)}: no such file")
    if "jenkins_package" in variables and "jenkins_java_package" not in variables:
        raise BundleError(
            "Jenkins needs a Java: give also a temurin-21-jre_*.deb, or on Debian 13 what "
            "`apt-get download openjdk-21-jre-headless` gets there"
        )
    roles = {path.name for path in (root / "roles").iterdir() if (path / "tasks").is_dir()}
    if "jenkins_package" not in variables:
        roles.discard("jenkins")
    built = release.build(root)
    files: dict[str, Path | bytes] = {path.name: path for path in [built, *given]}
    for lock in LOCKS:
        wheel = wheels.collect(root, lock, PYTHONS[debian], architecture)
        files[f"wheels/{wheel.name}"] = wheel
    with tempfile.TemporaryDirectory() as directory:
        needs = [str(path.resolve()) for path in given if path.suffix == ".deb"]
        debs = repository(Path(directory), debian, architecture, [*packages(root, roles), *needs])
        files[debs.name] = debs
        manifest = {
            "release": built.name,
            "variables": {"winemon_repository": debs.name, **variables},
            "files": {name: archive.sha256(path) for name, path in files.items() if isinstance(path, Path)},
        }
        files["manifest.json"] = json.dumps(manifest, indent=1, sort_keys=True).encode()
        name = built.name.removesuffix(".tar.gz").removeprefix("winemon-")
        target = root / "build" / f"winemon-bundle-{name}-debian-{debian}-{architecture}.tar.gz"
        archive.write(target, files, compress=False)
    return target


def unpack(root: Path, bundle: Path) -> dict[str, str]:
    """Verify a bundle and lay it down, once, and return where its release and variables are."""
    try:
        directory = root / "build" / "bundles" / archive.sha256(bundle)[:12]
        if not (directory / "variables.json").exists():
            verify(bundle, directory)
        manifest = json.loads((directory / "manifest.json").read_bytes())
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError) as error:
        raise BundleError(f"{bundle}: not a bundle that `make bundle` made ({error})") from error
    python = next(PYTHONS[n] for n in PYTHONS if f"-{n}-" in manifest["variables"]["winemon_repository"])
    for lock in LOCKS:
        wanted = wheels.target(root, lock, python, platform.machine())
        held = directory / "wheels" / wanted.name
        if not held.exists():
            raise BundleError(
                f"{bundle}: it was made for another requirements/{lock}.txt than this checkout has; "
                "use the commit that it was made from, or make it anew"
            )
        if not wanted.exists():
            archive.copy(held, wanted)
    return {"release": str(directory / manifest["release"]), "variables": str(directory / "variables.json")}


def verify(bundle: Path, directory: Path) -> None:
    """Unpack a bundle into a directory, each file only if it is what the manifest says."""
    shutil.rmtree(directory, ignore_errors=True)
    with tarfile.open(bundle) as tar:

        def content(name: str) -> bytes:
            file = tar.extractfile(name)
            if file is None:
                raise BundleError(f"{bundle}: {name} is not a file")
            return file.read()

        manifest = json.loads(content("manifest.json"))
        for name, expected in manifest["files"].items():
            path = directory / name
            if ".." in path.parts or not path.is_relative_to(directory):
                raise BundleError(f"{bundle}: {name} would lie outside")
            data = content(name)
            if archive.digest(data) != expected:
                raise BundleError(f"{bundle}: {name} is not what was packed: copy the bundle anew")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (directory / "manifest.json").write_bytes(content("manifest.json"))
    for path in (directory, *directory.rglob("*")):
        archive.flush(path)
    # Last: it says that all is there.
    variables = {name: str(directory / file) for name, file in manifest["variables"].items()}
    partial = directory / "variables.json.partial"
    partial.write_text(json.dumps(variables))
    archive.place(partial, directory / "variables.json")


def main() -> int:
    """Build or unpack a bundle."""
    parser = argparse.ArgumentParser(description="What machines without the internet need.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    make = verbs.add_parser("build")
    make.add_argument("debian", help="release of Debian, as in 13")
    make.add_argument("files", nargs="*", type=Path, help="packages that Debian does not have")
    use = verbs.add_parser("unpack")
    use.add_argument("bundle", type=Path)
    arguments = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    try:
        if arguments.verb == "build":
            target = build(root, arguments.debian, arguments.files)
            print(f"SHA-256 {archive.sha256(target)}")  # noqa: T201 - a command's answer
            print(target.relative_to(root))  # noqa: T201
        else:
            print(json.dumps(unpack(root, arguments.bundle)))  # noqa: T201
    except (BundleError, release.ReleaseError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - a command's message
        return 2
    except subprocess.CalledProcessError as error:
        print((error.stderr or b"").decode(), file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
