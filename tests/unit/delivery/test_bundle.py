"""A bundle has what the roles install, and is taken only whole and for the locks of this checkout."""

import json
import platform
import shutil
from pathlib import Path

import pytest

from delivery import archive, bundle, wheels

ROOT = Path(__file__).parents[3]
ARCHITECTURE = platform.machine()


def test_the_roles_tasks_say_what_is_installed() -> None:
    found = bundle.packages(ROOT, {"base", "prometheus", "locust", "python_venv", "grafana"})
    assert found == {"nftables", "prometheus", "whois", "python3-venv"}


def test_lists_in_templates_count() -> None:
    assert {"git", "shellcheck", "sudo"} <= bundle.packages(ROOT, {"jenkins"})


def test_every_package_of_every_role_has_a_plain_name() -> None:
    found = bundle.packages(ROOT, {path.name for path in (ROOT / "roles").iterdir()})
    assert all(name.replace("-", "").replace("+", "").isalnum() for name in found)


@pytest.mark.parametrize("name", ["grafana.zip", "prometheus_1_all.deb"])
def test_what_a_file_is_for_must_be_clear(tmp_path: Path, name: str) -> None:
    with pytest.raises(bundle.BundleError, match="a bundle takes"):
        bundle.build(tmp_path, "13", [tmp_path / name])


def test_unknown_releases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match="Debian 12 and 13"):
        bundle.build(tmp_path, "11", [])


def test_jenkins_needs_its_java(tmp_path: Path) -> None:
    jenkins = tmp_path / "jenkins_2.1_all.deb"
    jenkins.touch()
    with pytest.raises(bundle.BundleError, match="needs a Java"):
        bundle.build(tmp_path, "13", [jenkins])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a checkout with locks and nothing else."""
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def pack(checkout: Path, damage: str = "", **more: bytes) -> Path:
    """Write a bundle; a file that is to be damaged gets another content than the manifest says."""
    files = {"winemon-1.tar.gz": b"release", f"debian-13-{ARCHITECTURE}-0.tar.gz": b"repository", **more}
    for lock in bundle.LOCKS:
        files[f"wheels/{wheels.target(checkout, lock, '3.13', ARCHITECTURE).name}"] = lock.encode()
    manifest = {
        "release": "winemon-1.tar.gz",
        "variables": {"winemon_repository": f"debian-13-{ARCHITECTURE}-0.tar.gz"},
        "files": {name: archive.digest(content) for name, content in files.items()},
    }
    if damage:
        files[damage] += b"!"
    target = checkout / "bundle.tar.gz"
    archive.write(target, {**files, "manifest.json": json.dumps(manifest).encode()}, compress=False)
    return target


def test_a_bundle_is_laid_down_with_its_wheels_where_they_are_looked_for(checkout: Path) -> None:
    told = bundle.unpack(checkout, pack(checkout))
    assert Path(told["release"]).read_bytes() == b"release"
    variables = json.loads(Path(told["variables"]).read_text())
    assert Path(variables["winemon_repository"]).read_bytes() == b"repository"
    assert wheels.collect(checkout, "app", "3.13", ARCHITECTURE).read_bytes() == b"app"


@pytest.mark.parametrize("name", ["winemon-1.tar.gz", f"debian-13-{ARCHITECTURE}-0.tar.gz"])
def test_a_damaged_file_is_refused_every_time(checkout: Path, name: str) -> None:
    damaged = pack(checkout, damage=name)
    for _ in range(2):
        with pytest.raises(bundle.BundleError, match=f"{name} is not what was packed"):
            bundle.unpack(checkout, damaged)


def test_nothing_is_written_outside(checkout: Path) -> None:
    outside = pack(checkout, **{"../../../outside": b"x"})
    with pytest.raises(bundle.BundleError, match="outside"):
        bundle.unpack(checkout, outside)
    assert not (checkout / "outside").exists()


def test_wheels_of_other_locks_are_not_taken(checkout: Path) -> None:
    made = pack(checkout)
    with (checkout / "requirements" / "loadtest.txt").open("a") as lock:
        lock.write("# renewed\n")
    with pytest.raises(bundle.BundleError, match=r"another requirements/loadtest\.txt"):
        bundle.unpack(checkout, made)


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_what_is_no_bundle_is_said(checkout: Path, content: bytes | None) -> None:
    path = checkout / "bundle.tar.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(bundle.BundleError, match="not a bundle"):
        bundle.unpack(checkout, path)
