"""A release holds code, lock file and artifacts, is named by them, and is the same bytes every time."""

import json
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from delivery import archive, release, wheels

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Make a checkout with one commit and with artifacts that its manifest vouches for."""
    for folder in ("app", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".gitignore").write_text("/artifacts/\n/build/\n")
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    listed = {}
    for name in release.ARTIFACT_FILES:
        (artifacts / name).write_text(f"content of {name}")
        listed[name] = {"sha256": archive.sha256(artifacts / name), "size": (artifacts / name).stat().st_size}
    manifest = {"version": "0.1.0+0123abcd", "metrics": {"cv_mse": 0.4}, "artifacts": listed}
    (artifacts / "manifest.json").write_text(json.dumps(manifest))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=tester", "-c", "user.email=tester@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=first"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_two_builds_of_the_same_commit_are_the_same_bytes(checkout: Path) -> None:
    first = release.build(checkout)
    content = first.read_bytes()
    first.unlink()
    assert release.build(checkout) == first
    assert first.read_bytes() == content
    assert not list(first.parent.glob("*.partial"))


def test_the_name_says_which_commit_which_model_and_which_content(checkout: Path) -> None:
    commit = release.git(checkout, "rev-parse", "--short", "HEAD")
    first = release.build(checkout).name
    assert re.fullmatch(rf"winemon-{commit}-0123abcd-[0-9a-f]{{8}}\.tar\.gz", first)
    (checkout / "app" / "main.py").write_text("changed = True\n")
    changed = release.build(checkout).name
    assert changed.startswith(f"winemon-{commit}-dirty-0123abcd-")
    (checkout / "app" / "main.py").write_text("changed = False\n")
    assert release.build(checkout).name != changed


def test_the_same_model_trained_again_is_another_release(checkout: Path) -> None:
    first = release.build(checkout)
    path = checkout / "artifacts" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "trained_at": "2026-01-01T00:00:00Z"}))
    assert release.build(checkout) != first


def test_the_manifest_has_the_hash_of_every_file(checkout: Path) -> None:
    unpacked = checkout / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", release.build(checkout), "-C", unpacked], check=True)
    manifest = json.loads((unpacked / "manifest.json").read_text())
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert all(archive.sha256(unpacked / name) == expected for name, expected in manifest["files"].items())
    assert {
        "app/main.py",
        "requirements/app.txt",
        "artifacts/model.joblib",
        "artifacts/manifest.json",
    } <= files
    assert not any(name.startswith(("training", "tests")) for name in files)


def test_without_git_the_project_gives_the_version(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert release.build(checkout).name.startswith("winemon-0.1.0-0123abcd-")


def test_a_hooks_environment_names_no_other_repository(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = release.build(checkout).name
    other = tmp_path_factory.mktemp("other")
    subprocess.run(["git", "init", "--quiet", other], check=True)
    for variable, path in (("GIT_DIR", ".git"), ("GIT_WORK_TREE", ""), ("GIT_INDEX_FILE", ".git/index")):
        with monkeypatch.context() as environment:
            environment.setenv(variable, str(other / path))
            assert release.build(checkout).name == name, variable


def test_a_repository_around_the_checkout_does_not_name_it(checkout: Path) -> None:
    inner = checkout / "inner"
    shutil.copytree(checkout, inner, ignore=shutil.ignore_patterns(".git", "inner"))
    assert release.build(inner).name.startswith("winemon-0.1.0-0123abcd-")


def test_no_artifacts_no_release(checkout: Path) -> None:
    shutil.rmtree(checkout / "artifacts")
    with pytest.raises(release.ReleaseError, match="run `make train` first"):
        release.build(checkout)


def test_an_artifact_that_is_not_the_manifests_is_refused(checkout: Path) -> None:
    (checkout / "artifacts" / "model.joblib").write_text("another")
    with pytest.raises(
        release.ReleaseError, match=r"model\.joblib: not the file that manifest\.json vouches for"
    ):
        release.build(checkout)
    assert not (checkout / "build").exists()


def test_an_artifact_that_the_manifest_forgot_is_refused(checkout: Path) -> None:
    manifest = json.loads((checkout / "artifacts" / "manifest.json").read_text())
    del manifest["artifacts"]["baseline.json"]
    (checkout / "artifacts" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(release.ReleaseError, match=r"baseline\.json is not listed"):
        release.build(checkout)


@pytest.mark.thorough
def test_wheels_are_those_of_the_machines_python_with_their_hashes(tmp_path: Path) -> None:
    lock = (ROOT / "requirements" / "ansible.txt").read_text()
    # Two packages of a real lock file: one pure, one with a wheel for each Python.
    chosen = [block for block in lock.split("\n") if block]
    start = next(index for index, line in enumerate(chosen) if line.startswith("markupsafe=="))
    end = next(index for index in range(start + 1, len(chosen)) if not chosen[index].startswith("    "))
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "small.txt").write_text("\n".join(chosen[start:end]) + "\n")
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    target = wheels.collect(tmp_path, "small", "3.13", "aarch64")
    with tarfile.open(target) as tar:
        names = tar.getnames()
    assert len(names) == 2
    assert any("cp313-manylinux" in name and "aarch64" in name for name in names)
    content = target.read_bytes()
    assert wheels.collect(tmp_path, "small", "3.13", "aarch64") == target, "the second call finds it"
    target.unlink()
    assert wheels.collect(tmp_path, "small", "3.13", "aarch64").read_bytes() == content
