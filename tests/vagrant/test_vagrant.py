"""The VM scenario: up from a fresh clone, used, run again, reloaded, destroyed."""

import subprocess

from tests.e2e.test_one_machine import (  # noqa: F401
    test_a_model_that_was_tampered_with_is_refused_and_said,
    test_a_prediction_is_what_training_said_and_names_its_model,
    test_bad_input_gets_422_with_the_fields_name,
    test_every_request_is_counted_once_even_when_a_worker_is_killed,
    test_secrets_are_nobody_elses_business,
)
from tests.e2e.test_security import (  # noqa: F401
    test_consoles_ask_for_their_generated_password,
    test_firewalls_of_others_are_left_alone,
    test_our_units_are_hardened,
    test_services_run_as_users_without_rights,
)
from tests.vagrant.conftest import CLONE, VM


def libvirt(*command: str) -> str:
    return subprocess.run(["virsh", *command], capture_output=True, text=True, check=True).stdout


def test_the_inventory_of_no_option_is_the_vm(site: VM) -> None:
    assert (CLONE / "inventory/current").resolve().is_relative_to(CLONE / ".vagrant")
    site.play("ansible/verify.yml")


def test_a_forwarded_port_leads_to_the_vm(site: VM) -> None:
    assert (
        site.client.get("http://127.0.0.1:19090/-/ready", auth=site.secret("prometheus")).status_code == 200
    )


def test_site_yml_by_hand_changes_nothing(site: VM) -> None:
    assert site.changed(site.play("site.yml")) == 0


def test_reload_brings_everything_back(site: VM) -> None:
    boot = site.run("cat /proc/sys/kernel/random/boot_id")
    site.vagrant("reload")
    assert site.run("cat /proc/sys/kernel/random/boot_id") != boot
    site.play("ansible/verify.yml")
    assert site.run("systemctl --failed --no-legend") == ""
    assert "active (running)" in site.vagrant("ssh", "--command", "systemctl status --no-pager winemon-api")


def test_provision_changes_nothing(site: VM) -> None:
    assert site.changed(site.vagrant("provision")) == 0


def test_destroy_leaves_nothing(site: VM) -> None:
    found = libvirt("list", "--all", "--name"), libvirt("net-list", "--all", "--name")
    assert "winemon-test_winemon" in found[0]
    assert "winemon-test0" in found[1]
    qemu = ["pgrep", "--full", "guest=winemon-test_winemon"]
    assert subprocess.run(qemu, check=False, stdout=subprocess.DEVNULL).returncode == 0
    site.vagrant("destroy", "--force")
    assert "winemon-test" not in libvirt("list", "--all", "--name")
    assert "winemon-test" not in libvirt("net-list", "--all", "--name")
    assert "winemon-test_winemon" not in libvirt("vol-list", "default")
    assert subprocess.run(qemu, check=False, stdout=subprocess.DEVNULL).returncode == 1
    assert not (CLONE / "inventory/current").is_symlink()
    assert not (CLONE / ".vagrant/provisioners/ansible/inventory").exists()
    assert not (CLONE / ".vagrant/known_hosts").exists()
