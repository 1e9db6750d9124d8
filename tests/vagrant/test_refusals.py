"""Told before there is a VM: what is missing, and what helps."""

import os
import shutil
import subprocess

import pytest

from tests.vagrant.conftest import CLONE


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WINEMON_VAGRANT_MEMORY": "999999999"}, "have it do less: WINEMON_VAGRANT_MEMORY="),
        ({"WINEMON_VAGRANT_CPUS": "many"}, "WINEMON_VAGRANT_CPUS is a number, not many"),
        ({"LIBVIRT_DEFAULT_URI": "qemu+unix:///system?socket=/nonexistent"}, "libvirt has to run"),
        ({"PATH": "/nonexistent"}, "make is missing"),
        ({"PATH": "/nonexistent", "VAGRANT_NO_PLUGINS": "1", "VAGRANT_DEFAULT_PROVIDER": ""}, "apt install"),
    ],
)
def test_what_is_missing_is_said(environment: dict[str, str], said: str) -> None:
    vagrant = shutil.which("vagrant")
    assert vagrant
    result = subprocess.run(
        [vagrant, "up", "--no-tty"],
        cwd=CLONE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert said in result.stderr, result
    assert not (CLONE / "inventory/current").is_symlink()
