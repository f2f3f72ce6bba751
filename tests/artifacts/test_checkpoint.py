"""Checkpoints: bit for bit, whole or not at all at every event, damage found, rotation that deletes only its own."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.faulty_disk import KILLED, FaultyDisk, count_events, in_child
from tunekit.artifacts.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from tunekit.artifacts.run import RunFolder
from tunekit.errors import ResourceError, RunFolderError
from tunekit.files import durable
from tunekit.files.tensors import write_tensors


def make_state(step: int) -> dict[str, torch.Tensor]:
    """A state of every type, with scalars, empty tensors and tensors that are not contiguous."""
    generator = torch.Generator().manual_seed(step)
    wide = torch.randn(6, 4, generator=generator)
    return {
        "adapter.a": wide,
        "adapter.b": wide.t(),
        "half": wide.to(torch.float16),
        "brain": wide.to(torch.bfloat16),
        "rng": torch.randint(0, 256, (33,), generator=generator, dtype=torch.uint8),
        "order": torch.arange(step, step + 5, dtype=torch.int64),
        "scalar": torch.tensor(float(step)),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
    }


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[object, ...]]:
    """What must be equal: type, shape and bytes of each tensor."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def save(run: RunFolder, step: int, *, keep: int = 2, protect: tuple[int, ...] = ()) -> Path:
    return save_checkpoint(run, step, make_state(step), {"step": step, "loss": 0.1 + 0.2}, keep=keep, protect=protect)


def steps(run: RunFolder) -> list[int]:
    return [step for step, _ in list_checkpoints(run.checkpoints)]


def require_state(checkpoint: Checkpoint | None, *allowed: int) -> int:
    """The checkpoint is wholly the state of one of the allowed steps."""
    assert checkpoint is not None
    assert checkpoint.step in allowed
    assert bits(checkpoint.tensors) == bits(make_state(checkpoint.step))
    assert checkpoint.facts == {"step": checkpoint.step, "loss": 0.1 + 0.2}
    return checkpoint.step


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.open_new(tmp_path / "run")


def test_the_best_checkpoint_is_not_the_last_one(run: RunFolder) -> None:
    folders = [save_checkpoint(run, step, {}, {"loop": {"best_step": 2}}, keep=9) for step in (1, 2, 3)]
    assert [find_checkpoint(f"{run.path}@{name}") for name in ("1", "best", "last")] == folders


def test_everything_comes_back_bit_by_bit(run: RunFolder) -> None:
    assert load_newest(run) is None
    folder = save(run, 7)
    assert folder.name == "step-000007"
    checkpoint = load_newest(run)
    require_state(checkpoint, 7)
    assert checkpoint is not None
    assert all(tensor.device.type == "cpu" for tensor in checkpoint.tensors.values())
    shutil.rmtree(folder)  # what was loaded does not hang on the file
    assert bits(checkpoint.tensors) == bits(make_state(7))


def test_the_tensor_file_is_what_the_safetensors_package_reads(tmp_path: Path) -> None:
    size, _ = write_tensors(tmp_path / "x.safetensors", make_state(1), {"format": "pt"})
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert bits(load_file(tmp_path / "x.safetensors")) == bits(make_state(1))


def test_two_saves_of_one_state_are_equal_bytes(tmp_path: Path) -> None:
    folders = [save(RunFolder.open_new(tmp_path / name), 3) for name in ("a", "b")]
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_fact_that_is_not_json_never_reaches_the_disk(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(run, 1, {}, {"best": float("nan")}, keep=1)
    assert steps(run) == []
    assert list(run.checkpoints.iterdir()) == []


def test_everything_is_flushed_before_it_is_named(run: RunFolder) -> None:
    """Order of effects: each file flushed, the manifest after the others, the folder, the rename, its parent."""
    save(run, 1)
    events = [(kind, path.name) for kind, path in count_events(lambda: save(run, 2) and None)]
    rename = events.index(("rename", "step-000002"))
    for name in ("tensors.safetensors", "state.json", "manifest.json"):
        assert events.index(("fsync", name)) < rename
        assert max(index for index, event in enumerate(events) if event == ("write", name)) < events.index(
            ("fsync", name)
        )
    assert events.index(("fsync", "state.json")) < events.index(("create", "manifest.json"))
    assert events.index(("fsync", "tensors.safetensors")) < events.index(("create", "manifest.json"))
    assert events[rename - 1][0] == "fsync"
    assert events[rename - 1][1].startswith(".tmp-step-000002")
    assert events[rename + 1] == ("fsync", "checkpoints")


# --- killed at every event -----------------------------------------------------------------------------------------


def prepare_first(run: RunFolder) -> None:
    """Nothing saved yet."""


def prepare_rotation(run: RunFolder) -> None:
    """Two checkpoints, of which the next save drops one."""
    save(run, 1)
    save(run, 2)


def prepare_again(run: RunFolder) -> None:
    """The step to be saved is there already."""
    save(run, 2)
    save(run, 3)


def prepare_damaged(run: RunFolder) -> None:
    """The step to be saved is there without its manifest."""
    save(run, 2)
    (save(run, 3) / "manifest.json").unlink()


SITUATIONS: dict[str, tuple[Callable[[RunFolder], None], int]] = {
    "first": (prepare_first, 1),
    "rotation": (prepare_rotation, 1),
    "again": (prepare_again, 2),
    "damaged": (prepare_damaged, 2),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mode", ["kill", "tear"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_killed_at_every_event_leaves_the_old_or_the_new(tmp_path: Path, situation: str, mode: str) -> None:
    prepare, keep = SITUATIONS[situation]
    template = tmp_path / "template"
    with RunFolder.open_new(template) as run:
        prepare(run)
        old = steps(run)
    count = 1
    index = 0
    while index < count:
        place = tmp_path / f"run-{index}"
        shutil.copytree(template, place)
        disk = FaultyDisk(index, mode)

        def work(place: Path = place) -> None:
            with RunFolder.open_resume(place) as run:
                save(run, 3, keep=keep)

        if index == 0:  # how many events there are, on a copy of its own
            shutil.copytree(template, tmp_path / "counted")
            count = len(count_events(lambda: work(tmp_path / "counted")))
            assert count > 12
        assert in_child(work, disk) == KILLED
        with RunFolder.open_resume(place, warn=lambda text: None) as run:
            found = load_newest(run)
            if found is None:
                assert not old
            else:
                require_state(found, *old, 3)
            hidden = [entry.name for entry in run.checkpoints.iterdir()] if run.checkpoints.exists() else []
            assert not [name for name in hidden if name.startswith(".")]
            save(run, 3, keep=keep)
            assert require_state(load_newest(run), 3) == 3
        shutil.rmtree(place)
        index += 1


# --- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_at_every_event_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, forever: bool
) -> None:
    warnings: list[str] = []
    run = RunFolder.open_new(tmp_path / "run", warn=warnings.append)
    save(run, 1)
    count = len(count_events(lambda: save(run, 2, keep=1) and None))
    for index in range(count):
        shutil.rmtree(run.checkpoints)
        save(run, 1)
        warnings.clear()
        with monkeypatch.context() as patch:
            patch.setattr(durable, "perform", FaultyDisk(index, "fail", number, forever).perform)
            failure = None
            try:
                save(run, 2, keep=1)
            except ResourceError as error:
                failure = error
        if failure is None:  # only the removal of the old one may fail softly
            assert warnings, f"event {index} failed and nobody was told"
        else:
            assert failure.exit_code == 4
            assert str(run.path) in str(failure)
        checkpoint = load_newest(run)
        found = require_state(checkpoint, 1, 2)
        assert found == 2 or 1 in steps(run)
        assert not [entry for entry in run.checkpoints.iterdir() if entry.name.startswith(".")]
        save(run, 2, keep=1)
        assert steps(run) == [2]


def test_the_message_of_a_full_disk_names_path_and_bytes(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    events = count_events(lambda: save(run, 2) and None)
    write = next(index for index, (kind, path) in enumerate(events) if kind == "write" and path.name != "manifest.json")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "perform", FaultyDisk(write, "fail").perform)
        with pytest.raises(ResourceError, match=r"no room for \d+ bytes for .*tensors\.safetensors: No space left"):
            save(run, 3)


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    """The system itself refuses half way through the tensors: exit 4, the old checkpoint whole, no rubbish."""
    run = RunFolder.open_new(tmp_path / "run")
    save(run, 1)
    big = torch.zeros(100_000)  # here: a fork has none of the threads that fill a large tensor
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(run, 2, {"big": big}, {}, keep=1)
        except ResourceError as error:
            os._exit(error.exit_code if "tensors.safetensors" in str(error) else 99)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert [entry.name for entry in run.checkpoints.iterdir()] == ["step-000001"]
    require_state(load_newest(run), 1)


# --- damage --------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "empty", "link", "folder", "flipped"])
def test_a_damaged_newest_falls_back_and_says_so(tmp_path: Path, name: str, damage: str) -> None:
    warnings: list[str] = []
    run = RunFolder.open_new(tmp_path / "run", warn=warnings.append)
    save(run, 1)
    path = save(run, 2) / name
    data = path.read_bytes()
    if damage == "flipped":
        flip(path, len(data) // 2)
    else:
        path.unlink()
    if damage == "short":
        path.write_bytes(data[:-2])
    elif damage == "long":
        path.write_bytes(data + b"}")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "folder":
        path.mkdir()
    require_state(load_newest(run), 1)
    assert len(warnings) == 1
    assert "step-000002" in warnings[0]
    assert "step-000001" in warnings[0]


def test_one_flipped_bit_anywhere_is_found(run: RunFolder) -> None:
    save(run, 1)
    folder = save(run, 2)
    run.warn = lambda text: None
    for name in ("tensors.safetensors", "state.json"):
        path = folder / name
        whole = path.read_bytes()
        for offset in range(0, len(whole), 37):
            flip(path, offset)
            require_state(load_newest(run), 1)
            path.write_bytes(whole)
    require_state(load_newest(run), 2)
    # In the manifest a flipped bit may fall on white space; never does another state come back.
    path = folder / "manifest.json"
    whole = path.read_bytes()
    for offset in range(len(whole)):
        flip(path, offset)
        with contextlib.suppress(RunFolderError):  # the bit made its format number larger
            require_state(load_newest(run), 1, 2)
        path.write_bytes(whole)


def test_none_whole_is_refused_and_names_each(run: RunFolder) -> None:
    folders = [save(run, 1), save(run, 2)]
    (folders[0] / "state.json").unlink()
    (folders[1] / "manifest.json").unlink()
    with pytest.raises(
        RunFolderError, match=r"step-000002: manifest\.json is missing; step-000001: state\.json is missing"
    ):
        load_newest(run)


def test_one_asked_for_by_name_is_refused_if_damaged(run: RunFolder) -> None:
    folder = save(run, 1)
    require_state(load_checkpoint(folder), 1)
    flip(folder / "tensors.safetensors", 900)
    with pytest.raises(RunFolderError, match=r"step-000001 is damaged: tensors\.safetensors differs"):
        load_checkpoint(folder)
    with pytest.raises(RunFolderError, match="step-000007 is damaged"):
        load_checkpoint(run.checkpoints / "step-000007")


def test_a_newer_format_is_refused_not_passed_over(run: RunFolder) -> None:
    save(run, 1)
    path = save(run, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(RunFolderError, match="newer tunekit"):
        load_newest(run)


@pytest.mark.parametrize(
    "manifest",
    [b"[]", b"{}", b"[" * 5000, b'{"format": "tunekit-checkpoint", "version": 1, "step": 2, "files": {}}',
     b"\xff\xfe", b'{"format": "tunekit-checkpoint", "version": "1"}',
     b'{"format": "tunekit-checkpoint", "version": true}',
     b'{"format": "tunekit-checkpoint", "version": 1, "step": 2, "files": {"state.json": 1, "tensors.safetensors": 1}}',
    ],
)  # fmt: skip
def test_a_nonsense_manifest_is_damage(run: RunFolder, manifest: bytes) -> None:
    run.warn = lambda text: None
    save(run, 1)
    (save(run, 2) / "manifest.json").write_bytes(manifest)
    require_state(load_newest(run), 1)


def test_a_checkpoint_under_another_name_is_damage(run: RunFolder) -> None:
    run.warn = lambda text: None
    save(run, 1)
    folder = save(run, 2)
    folder.rename(folder.with_name("step-000009"))
    require_state(load_newest(run), 1)


# --- rotation ------------------------------------------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_the_protected(run: RunFolder) -> None:
    for step in range(1, 7):
        save(run, step, keep=2, protect=(2,))
    assert steps(run) == [6, 5, 2]
    save(run, 7, keep=1, protect=(6,))
    assert steps(run) == [7, 6]


def test_the_order_of_steps_counts_not_of_digits_or_times(run: RunFolder) -> None:
    for step in (999_999, 1_000_000, 1_000_001):
        save(run, step, keep=2)
    assert steps(run) == [1_000_001, 1_000_000]


def test_rotation_deletes_only_what_it_wrote(run: RunFolder, tmp_path: Path) -> None:
    save(run, 1, keep=9)
    save(run, 2, keep=9)
    (run.checkpoints / "step-000001" / "notes.txt").write_text("mine")
    foreign = run.checkpoints / "step-000000"
    foreign.mkdir()
    (foreign / "weights.bin").write_text("mine too")
    treasure = tmp_path / "treasure"
    shutil.copytree(run.checkpoints / "step-000002", treasure / "inner")
    (run.checkpoints / "step-000000-backup").mkdir()
    (run.checkpoints / ".tmp-step-000001-1").mkdir()
    (run.checkpoints / ".tmp-step-000001-1" / "notes.txt").write_text("mine as well")
    (run.checkpoints / "step-000003").symlink_to(treasure / "inner")
    (run.checkpoints / ".deleting-step-000003-5").symlink_to(treasure / "inner")
    for step in (4, 5, 6):
        save(run, step, keep=1)
    run.warn = lambda text: None
    require_state(load_newest(run), 6)
    assert (run.checkpoints / "step-000001" / "notes.txt").read_text() == "mine"
    assert (foreign / "weights.bin").exists()
    assert (run.checkpoints / "step-000000-backup").exists()
    assert (run.checkpoints / ".tmp-step-000001-1" / "notes.txt").exists()
    assert (run.checkpoints / "step-000003").is_symlink()
    assert len(list((treasure / "inner").iterdir())) == 3
    assert not (run.checkpoints / "step-000002").exists()
    assert not (run.checkpoints / "step-000005").exists()


def test_a_damaged_newer_one_does_not_push_out_the_one_just_saved(run: RunFolder) -> None:
    """The run went back from a damaged step 9 to step 1 and saves step 2: that one stays and is gone on from."""
    run.warn = lambda text: None
    save(run, 1)
    flip(save(run, 9) / "tensors.safetensors", 900)
    require_state(load_newest(run), 1)
    save(run, 2, keep=1)
    require_state(load_newest(run), 2)
    for step in range(3, 10):
        save(run, step, keep=1)
    assert steps(run) == [9]
    require_state(load_newest(run), 9)


def test_a_damaged_older_one_does_not_count_as_kept(run: RunFolder) -> None:
    save(run, 1, keep=9)
    (save(run, 2, keep=9) / "state.json").unlink()
    save(run, 3, keep=2)
    assert steps(run) == [3, 1]


def test_a_failing_removal_is_told_and_the_run_goes_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    run.warn = warnings.append
    save(run, 1)

    def perform(kind: str, path: Path, action: Callable[[], object]) -> object:
        if kind in ("unlink", "rmdir"):
            raise PermissionError(errno.EACCES, "denied", str(path))
        return action()

    monkeypatch.setattr(durable, "perform", perform)
    save(run, 2, keep=1)
    assert steps(run) == [2]
    assert "could not remove the old checkpoint" in warnings[0]
