import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.core.errors import RunDirError
from tunesmith.core.fingerprint import hash_json
from tunesmith.training.checkpoint import (
    DamagedCheckpoint,
    delete_old_checkpoints,
    list_checkpoints,
    open_newest,
    read_checkpoint,
    write_checkpoint,
)

# Forked children do nothing but save and die; newer Pythons warn of forking beside other threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

FILES = ["manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"]


def save(parent: Path, step: int, *, size: int = 500) -> Path:
    """A checkpoint that says its step number everywhere."""
    tensors = {
        "weights": {
            "a": torch.full((size,), float(step)),
            "b": torch.full((3, 2), step, dtype=torch.bfloat16),
        },
        "optimizer": {"step.a": torch.tensor(float(step)), "random": torch.arange(7, dtype=torch.uint8)},
    }
    return write_checkpoint(parent, step, tensors=tensors, state={"step": step})


def test_what_is_written_is_read_back_and_is_an_ordinary_safetensors_file(tmp_path):
    folder = save(tmp_path, 7)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    checkpoint = read_checkpoint(folder)
    assert checkpoint.state == {"step": 7}
    weights = load_file(folder / "weights.safetensors")
    assert torch.equal(weights["a"], torch.full((500,), 7.0))
    assert weights["b"].dtype == torch.bfloat16
    assert checkpoint.tensors("optimizer")["step.a"].shape == ()
    assert checkpoint.tensors("best") == {}


def test_a_tensor_that_is_not_contiguous_keeps_its_values(tmp_path):
    matrix = torch.arange(6.0).reshape(2, 3).T
    folder = write_checkpoint(tmp_path, 1, tensors={"weights": {"m": matrix}}, state={})
    assert torch.equal(load_file(folder / "weights.safetensors")["m"], matrix)


def test_the_newest_is_chosen_by_step_number_not_by_time(tmp_path):
    for step in (100, 9, 20):
        save(tmp_path, step)
    os.utime(tmp_path / "step-9", (2e9, 2e9))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-100", "step-20", "step-9"]


def test_a_second_checkpoint_of_a_step_stands_beside_the_first_and_counts_as_newer(tmp_path):
    save(tmp_path, 5)
    assert save(tmp_path, 5).name == "step-5-1"
    assert list_checkpoints(tmp_path)[0].name == "step-5-1"


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    delete_old_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3"]


def test_nothing_is_deleted_while_the_newest_does_not_verify(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip_bit(tmp_path / "step-3" / "weights.safetensors", 2000)
    with pytest.raises(RunDirError, match=r"can't be read back: weights\.safetensors has changed"):
        delete_old_checkpoints(tmp_path, keep=1)
    assert len(list_checkpoints(tmp_path)) == 3


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def mutations(folder: Path):
    """Truncations, flipped bits, appended bytes and absence, of every file at many offsets."""
    rng = random.Random(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        yield f"{path.name} missing", lambda p=path: p.unlink()
        yield f"{path.name} empty", lambda p=path: p.write_bytes(b"")
        yield f"{path.name} longer", lambda p=path, d=data: p.write_bytes(d + b"x")
        for offset in sorted({0, 1, 7, 8, len(data) - 1, *(rng.randrange(len(data)) for _ in range(25))}):
            yield f"{path.name} cut at {offset}", lambda p=path, d=data, o=offset: p.write_bytes(d[:o])
            yield (
                f"{path.name} flipped at {offset}",
                lambda p=path, o=offset: flip_bit(p, o, rng.randrange(8)),
            )


def test_every_damage_is_found_set_aside_and_the_checkpoint_before_is_used(tmp_path):
    pristine, work = tmp_path / "pristine", tmp_path / "work"
    save(pristine, 1)
    save(pristine, 2)
    shutil.copytree(pristine, work)
    count = 0
    for what, damage in mutations(work / "step-2"):
        damage()
        checkpoint, warnings = open_newest(work)
        assert checkpoint is not None, what
        assert checkpoint.state == {"step": 1}, what
        assert "checkpoint step-2 is damaged: " in warnings[0], what
        assert "moved to damaged-step-2" in warnings[0], what
        shutil.rmtree(work / "damaged-step-2")
        shutil.copytree(pristine / "step-2", work / "step-2")
        count += 1
    assert count >= 200


def test_the_damaged_file_is_named(tmp_path):
    folder = save(tmp_path, 1)
    flip_bit(folder / "optimizer.safetensors", -1)
    with pytest.raises(DamagedCheckpoint, match=r"optimizer\.safetensors has changed since it was written"):
        read_checkpoint(folder)


def test_when_all_are_damaged_the_run_ends_instead_of_starting_again(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    for name in ("step-1", "step-2"):
        (tmp_path / name / "state.json").unlink()
    for _ in range(2):  # and it stays so the next time
        with pytest.raises(
            RunDirError, match=r"no checkpoint is intact, 2 damaged.*never restarts at step 0"
        ):
            open_newest(tmp_path)


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert open_newest(tmp_path / "absent") == (None, [])


def test_a_checkpoint_of_another_version_is_refused_not_set_aside(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["schema"] = 2
    # The hash sits at the end of the document, as the writer puts it.
    manifest["sha256"] = hash_json(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    with pytest.raises(RunDirError, match="checkpoint schema 2; this version reads schema 1"):
        open_newest(tmp_path)
    assert folder.is_dir()


# --- faults, in forked processes --------------------------------------------------------------------------------------


def run_in_child(work) -> int:
    """Run `work` in a forked process; its exit status (negative: killed by that signal)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def save_four_keeping_two(parent: Path, committed: Path) -> None:
    for step in range(1, 5):
        save(parent, step, size=5000)
        committed.write_text(str(step))
        delete_old_checkpoints(parent, keep=2)


def check_after_crash(parent: Path, committed: Path, where: str) -> None:
    """The newest checkpoint is whole, and not older than the last one whose saving had returned."""
    last = int(committed.read_text()) if committed.exists() else 0
    checkpoint, warnings = open_newest(parent)
    assert not warnings, where
    found = checkpoint.state["step"] if checkpoint else 0
    assert found >= last, where
    if checkpoint:
        assert torch.equal(checkpoint.tensors("weights")["a"], torch.full((5000,), float(found))), where
    # The next run saves over whatever the crash left behind.
    save(parent, 50, size=5000)
    delete_old_checkpoints(parent, keep=1)
    assert sorted(path.name for path in parent.iterdir()) == ["step-50"], where


def test_a_kill_at_every_point_of_saving_and_deleting_loses_no_committed_checkpoint(tmp_path, monkeypatch):
    points = 0
    while True:
        points += 1
        parent, committed = tmp_path / str(points), tmp_path / f"{points}.committed"
        monkeypatch.setenv("TUNESMITH_FAILPOINT", str(points))
        status = run_in_child(lambda p=parent, c=committed: save_four_keeping_two(p, c))
        monkeypatch.delenv("TUNESMITH_FAILPOINT")
        if status == 0:
            break
        assert status == -signal.SIGKILL
        check_after_crash(parent, committed, f"point {points}")
    assert points > 40


def test_random_kills_lose_no_committed_checkpoint(tmp_path):
    rng = random.Random(1)
    for trial in range(15):
        parent, committed = tmp_path / str(trial), tmp_path / f"{trial}.committed"
        parent.mkdir()
        child = os.fork()
        if child == 0:
            while True:
                save_four_keeping_two(parent, committed)
        time.sleep(rng.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # The loop saves steps 1 to 4 again and again: any of them may be newest, but it must be whole.
        checkpoint, warnings = open_newest(parent)
        assert not warnings
        assert checkpoint is not None or not committed.exists()


def test_a_file_that_cannot_grow_ends_in_one_line_and_leaves_the_old_checkpoint_alone(tmp_path):
    save(tmp_path, 1)

    def save_with_little_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(RunDirError, match=r"File too large \(the checkpoint of step 2 takes 0.0 MB\)"):
            save(tmp_path, 2, size=2000)
        assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
        read_checkpoint(tmp_path / "step-1")

    assert run_in_child(save_with_little_room) == 0


def test_too_little_space_is_seen_before_anything_is_written(tmp_path):
    class Huge(torch.Tensor):
        """Claims more bytes than any disk has; nobody gets to look at its data."""

        def numel(self):
            return 1 << 60

    tensors = {"weights": {"a": torch.zeros(1).as_subclass(Huge)}}
    with pytest.raises(RunDirError, match=r"a checkpoint takes [\d,.]+ MB, [\d,.]+ MB are free"):
        write_checkpoint(tmp_path, 1, tensors=tensors, state={})
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import shutil, sys
from pathlib import Path
import torch
from tunesmith.core.errors import RunDirError
from tunesmith.core.fingerprint import hash_json
from tunesmith.training import checkpoint
parent = Path(sys.argv[1])
big = {"weights": {"a": torch.ones(300_000)}}
checkpoint.write_checkpoint(parent, 1, tensors=big, state={})
free = shutil.disk_usage(parent).free
(parent / "other").write_bytes(b"x" * (free - 2_400_000))
# Enough at the estimate; another program fills the disk while we write.
checkpoint._check_free_bytes = lambda parent, needed: (parent / "more").write_bytes(b"x" * 1_800_000)
try:
    checkpoint.write_checkpoint(parent, 2, tensors=big, state={})
except RunDirError as error:
    print(error)
names = sorted(path.name for path in parent.iterdir())
checkpoint.read_checkpoint(parent / "step-1")
print(names)
"""


def test_a_disk_that_fills_up_while_saving_keeps_the_old_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=8m none "{disk}" && exec "$@"', "sh"]
    if subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk")
    run = subprocess.run(
        [*mount, sys.executable, "-c", FULL_DISK, str(disk)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    message, names = run.stdout.splitlines()
    assert "no space left on the disk (the checkpoint of step 2 takes 1.2 MB). Free some space" in message
    assert names == "['more', 'other', 'step-1']"


def test_a_read_only_folder_is_named_with_the_cure(tmp_path):
    def save_as_nobody():
        os.chmod(tmp_path, 0o555)
        if os.geteuid() == 0:
            os.setuid(65534)
        with pytest.raises(RunDirError, match="cannot be written"):
            save(tmp_path / "checkpoints", 1)

    for parent in reversed(tmp_path.parents[:2]):
        os.chmod(parent, 0o755)
    assert run_in_child(save_as_nobody) == 0
    os.chmod(tmp_path, 0o755)
