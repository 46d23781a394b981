"""How many threads compute, and what decides on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ospq_export.cli.app import app
from ospq_export.errors import InputError
from ospq_export.world.threads import cgroup_quota, choose_threads, use_threads, wait_passively

MOUNT = "31 23 0:28 {root} {at} rw,relatime shared:9 - {kind} {kind} {options}\n"


def control_groups(folder: Path, group: str, mount: str) -> Path:
    """A /proc whose process is in `group`, with control groups mounted as `mount` says."""
    process = folder / "proc" / "self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(group)
    (process / "mountinfo").write_text("23 1 8:1 / / rw - ext4 /dev/sda rw\n" + mount)
    return folder / "proc"


def second_version(folder: Path, path: str, root: str = "/") -> Path:
    mount = MOUNT.format(root=root, at=folder / "sys", kind="cgroup2", options="rw,nsdelegate")
    return control_groups(folder, f"0::{path}\n", mount)


def first_version(folder: Path, path: str, root: str = "/") -> Path:
    mount = MOUNT.format(root=root, at=folder / "sys", kind="cgroup", options="rw,cpu,cpuacct")
    other = MOUNT.format(root="/", at=folder / "memory", kind="cgroup", options="rw,memory")
    return control_groups(folder, f"4:memory:/elsewhere\n2:cpu,cpuacct:{path}\n0::/\n", other + mount)


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.mark.parametrize(
    ("inner", "outer", "quota"),
    [
        ("150000 100000", "max 100000", 1.5),
        ("max 100000", "200000 50000", 4.0),
        ("300000 100000", "200000 100000", 2.0),
        ("max 100000", "max 100000", None),
    ],
)
def test_second_version_takes_the_least_of_all_levels(tmp_path, inner, outer, quota):
    proc = second_version(tmp_path, "/pods/one")
    put(tmp_path / "sys/pods/one/cpu.max", inner)
    put(tmp_path / "sys/pods/cpu.max", outer)
    assert cgroup_quota(proc) == quota


def test_a_container_sees_its_own_group_at_the_mount(tmp_path):
    # The path is the host's; what is mounted is the container's own folder.
    proc = second_version(tmp_path, "/docker/0123")
    put(tmp_path / "sys/cpu.max", "100000 100000")
    assert cgroup_quota(proc) == 1.0


@pytest.mark.parametrize("root", ["/", "/docker/0123"])
def test_first_version(tmp_path, root):
    proc = first_version(tmp_path, "/docker/0123", root)
    folder = tmp_path / "sys" / ("docker/0123" if root == "/" else "")
    put(folder / "cpu.cfs_quota_us", "250000")
    put(folder / "cpu.cfs_period_us", "100000")
    assert cgroup_quota(proc) == 2.5


def test_first_version_without_a_limit(tmp_path):
    proc = first_version(tmp_path, "/")
    put(tmp_path / "sys/cpu.cfs_quota_us", "-1")
    put(tmp_path / "sys/cpu.cfs_period_us", "100000")
    assert cgroup_quota(proc) is None


def test_no_control_groups(tmp_path):
    assert cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "threads"), [("350000", 3), ("40000", 1), ("100000000", 64)])
def test_a_quota_bounds_the_threads(tmp_path, monkeypatch, quota, threads):
    monkeypatch.setattr("ospq_export.world.threads.usable_cores", lambda: 64)
    proc = second_version(tmp_path, "/")
    put(tmp_path / "sys/cpu.max", f"{quota} 100000")
    assert choose_threads(None, 64, {}, proc).count == threads


def test_the_environment_and_the_command_line_come_first(tmp_path):
    proc = second_version(tmp_path, "/")
    put(tmp_path / "sys/cpu.max", "100000 100000")
    assert choose_threads(None, 7, {"OMP_NUM_THREADS": "7"}, proc).count == 7
    assert choose_threads(2, 7, {"OMP_NUM_THREADS": "7"}, proc).count == 2
    # OpenMP itself passes over what is no number.
    assert choose_threads(None, 7, {"OMP_NUM_THREADS": "all"}, proc).count == 1


@pytest.mark.parametrize("count", [0, -1, 4 * (os.cpu_count() or 1) + 1])
def test_impossible_numbers(count):
    with pytest.raises(InputError, match="`threads`"):
        choose_threads(count, 1, {})


COMMANDS = {
    "calibrate": ["vit_tiny_patch16_224", "--data", "none", "--out", "none"],
    "inspect": ["vit_tiny_patch16_224", "--data", "none"],
    "validate": ["none", "--data", "none"],
    "export": ["none"],
    "demo": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_an_impossible_number(command):
    done = CliRunner().invoke(app, [command, *COMMANDS[command], "--threads", "0"])
    assert isinstance(done.exception, InputError)
    assert "`threads`" in str(done.exception)


def test_torch_is_told():
    before = torch.get_num_threads()
    try:
        assert use_threads(2).count == torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_choice_of_how_to_wait_is_left_alone(name):
    environment = {name: "1"}
    wait_passively(environment)
    assert environment == {name: "1"}
    wait_passively(fresh := {})
    assert fresh == {"OMP_WAIT_POLICY": "PASSIVE"}


def test_the_package_itself_changes_nothing():
    code = "import os, ospq_export, ospq_export.cli; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.strip() == "None"


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="one core, or no affinity"
)
def test_the_command_line_heeds_the_affinity_mask():
    code = (
        "import os; os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1]);"
        "from ospq_export.world.threads import choose_threads; print(choose_threads(None, 8, {}).count)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == "1"
