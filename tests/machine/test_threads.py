"""The number of threads and how they wait: affinity, control groups of both versions, and the user's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunekit.machine import threads
from tunekit.machine.threads import cores, cpu_quota, thread_settings


def write(root: Path, files: dict[str, str]) -> Path:
    """A tree of small files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n", encoding="ascii")
    return root


def quota_of(tmp_path: Path, groups: str, files: dict[str, str]) -> float | None:
    """The quota of a process in these control groups."""
    write(tmp_path, {"groups": groups, **{f"mounts/{name}": text for name, text in files.items()}})
    return cpu_quota(tmp_path / "groups", tmp_path / "mounts")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {}, None),
        # the group of a service is limited by the slice around it
        ("0::/app.slice/run", {"app.slice/cpu.max": "200000 100000", "app.slice/run/cpu.max": "400000 100000"}, 2.0),
        ("0::/app.slice/run", {"app.slice/cpu.max": "max 100000", "app.slice/run/cpu.max": "50000 100000"}, 0.5),
        # a container's path is the host's, and its own group is the root of the mount
        ("0::/docker/1a2b", {"cpu.max": "300000 100000"}, 3.0),
        ("4:memory:/x\n1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "250000", "cpu/x/cpu.cfs_period_us": "100000"}, 2.5),
        ("1:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        (
            "3:cpu,cpuacct:/docker/1a2b\n0::/",
            {"cpu,cpuacct/cpu.cfs_quota_us": "100000", "cpu,cpuacct/cpu.cfs_period_us": "50000"},
            2.0,
        ),
        ("4:cpuset:/", {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "50000"}, None),
        ("0::/", {"cpu.max": "not a number"}, None),
        ("0::/", {"cpu.max": "100000 0"}, None),
        ("no colon", {}, None),
    ],
)
def test_quota_of_both_versions(tmp_path: Path, groups: str, files: dict[str, str], expected: float | None) -> None:
    assert quota_of(tmp_path, groups, files) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "groups", tmp_path) is None


def test_two_processors_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 4, 6}, raising=False)
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 6: "2,6"}
    write(tmp_path, {f"cpu{at}/topology/thread_siblings_list": text for at, text in siblings.items()})
    assert cores(tmp_path) == 3
    assert cores(tmp_path / "absent") == 4


@pytest.mark.parametrize(
    ("quota", "cores", "written", "expected"),
    [
        (None, 8, {}, None),
        (1.5, 8, {}, "2"),
        (0.25, 8, {}, "1"),
        (8.0, 8, {}, None),
        (16.0, 8, {}, None),
        (2.0, 8, {"OMP_NUM_THREADS": "5"}, None),
    ],
)
def test_count_follows_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int, written: dict[str, str], expected: str | None
) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    monkeypatch.setattr(threads, "cores", lambda: cores)
    assert thread_settings(written).get("OMP_NUM_THREADS") == expected
