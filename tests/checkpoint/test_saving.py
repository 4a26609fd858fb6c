"""A checkpoint is there whole or not at all, whatever kills the process; what was altered later is found and named."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch

from lpexp import checkpoint
from lpexp.errors import RunError

REPO = Path(__file__).parents[2]


def writer(payload: str):
    """What a trainer's save does, small: two files, one of them in a folder."""

    def write(directory: Path) -> None:
        (directory / "optimizer").mkdir()
        (directory / "weights.bin").write_bytes(payload.encode() * 1000)
        (directory / "optimizer" / "moments.bin").write_bytes(payload.encode() * 500)

    return write


def save(run: Path, step: int, payload: str, keep: int = 3) -> Path:
    return checkpoint.save(run, step, {"payload": payload}, writer(payload), keep)


def newest(run: Path) -> tuple[Path, dict, list[str]]:
    skipped: list[str] = []
    found = checkpoint.newest(run, skipped.append)
    assert found is not None
    return *found, skipped


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())


# -- there and back ----------------------------------------------------------------------------------------------------


def test_what_was_saved_is_the_newest_and_nothing_is_skipped(tmp_path):
    save(tmp_path, 10, "a")
    save(tmp_path, 20, "b")
    directory, state, skipped = newest(tmp_path)
    assert directory.name == "000020" and state["step"] == 20 and state["payload"] == "b" and skipped == []
    assert (directory / "weights.bin").read_bytes() == b"b" * 1000


def test_steps_are_compared_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 20):
        save(tmp_path, step, str(step))
    assert newest(tmp_path)[1]["step"] == 1_000_000


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert checkpoint.newest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_k_are_kept(tmp_path, keep):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, "x", keep)
    assert names(tmp_path) == [f"{step:06d}" for step in range(5 - keep, 5)]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 1, "a")
    save(tmp_path, 2, "b")
    save(tmp_path, 2, "c")
    assert names(tmp_path) == ["000001", "000002"]
    assert newest(tmp_path)[1]["payload"] == "c"


def test_a_torn_later_checkpoint_does_not_crowd_out_the_good_ones(tmp_path):
    """Resumed from 10 because 40 is torn: saving 20 with keep=1 must keep 20, not 40."""
    save(tmp_path, 10, "a")
    (save(tmp_path, 40, "b") / "weights.bin").unlink()
    save(tmp_path, 20, "c", keep=1)
    directory, _, skipped = newest(tmp_path)
    assert directory.name == "000020" and "000040" in skipped[0]


def test_nothing_is_pruned_before_the_new_one_verifies(tmp_path, monkeypatch):
    save(tmp_path, 1, "a", keep=1)
    monkeypatch.setattr(checkpoint, "sync_tree", lambda d: (d / "weights.bin").write_bytes(b"bad disk"))
    with pytest.raises(RunError, match=r"does not read back.*weights\.bin"):
        save(tmp_path, 2, "b", keep=1)
    monkeypatch.undo()
    directory, _, skipped = newest(tmp_path)
    assert directory.name == "000001" and "weights.bin" in skipped[0]


# -- kills -------------------------------------------------------------------------------------------------------------

TOUCHES_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


def die_at(n: int) -> None:
    """SIGKILL this process at its n-th operation on the file system."""
    left = n

    def hook(event: str, _: object) -> None:
        nonlocal left
        if event in TOUCHES_DISK:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_a_kill_at_any_operation_leaves_a_complete_checkpoint(tmp_path, child, step, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # for speed: what a killed process wrote survives without it
    n = killed = 0
    seen = set()
    while True:
        n += 1
        run = tmp_path / str(n)
        save(run, 1, "old", keep=1)

        def attempt(run: Path = run, n: int = n) -> str:
            die_at(n)
            save(run, step, "new", keep=1)
            return "saved"

        code, text = child(attempt)
        directory, state, skipped = newest(run)
        assert skipped == []
        assert (directory / "weights.bin").read_bytes() == state["payload"].encode() * 1000
        named = [d for d in directory.parent.iterdir() if not d.name.startswith(".tmp-")]
        assert [checkpoint.verify(d) for d in named] == [None] * len(named), "half a checkpoint has a name"
        seen.add(state["payload"])
        save(run, 3, "next", keep=1)  # the next save sweeps what the dead one left
        assert names(run) == ["000003"]
        if code == 0:
            assert text == "saved" and state["payload"] == "new"
            break
        assert code == -signal.SIGKILL, text
        killed += 1
    assert killed > 30 and seen == {"old", "new"}


@pytest.mark.parametrize("where, survivor", [
    ("_write_manifest", "old"),  # before the manifest
    ("sync_tree", "old"),
    ("_set_aside", "old"),  # before the rename
    ("verify", "new"),
    ("_prune", "new"),  # before the old one goes
])  # fmt: skip
def test_a_kill_at_a_named_boundary_leaves_the_expected_one(tmp_path, child, where, survivor):
    save(tmp_path, 1, "old", keep=1)

    def attempt() -> str:
        setattr(checkpoint, where, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        save(tmp_path, 2, "new", keep=1)
        return "survived"

    assert child(attempt)[0] == -signal.SIGKILL
    assert newest(tmp_path)[1]["payload"] == survivor


def test_the_only_complete_one_survives_two_kills_and_a_tear(tmp_path, child):
    """Replaced, killed before the old one went, the new one torn, replaced again, killed before the rename."""
    save(tmp_path, 1, "old", keep=1)

    def killed_in(name: str) -> None:
        def attempt() -> str:
            setattr(checkpoint, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, 1, "new", keep=1)
            return "survived"

        assert child(attempt)[0] == -signal.SIGKILL

    killed_in("_prune")
    assert names(tmp_path) == ["000001", "000001.replaced"] and newest(tmp_path)[1]["payload"] == "new"
    (tmp_path / checkpoint.FOLDER / "000001" / "weights.bin").unlink()
    assert newest(tmp_path)[1]["payload"] == "old"

    def attempt() -> str:
        set_aside = checkpoint._set_aside

        def then_die(final: Path) -> None:
            set_aside(final)
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint._set_aside = then_die
        save(tmp_path, 1, "newer", keep=1)
        return "survived"

    assert child(attempt)[0] == -signal.SIGKILL
    assert newest(tmp_path)[1]["payload"] == "old"


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """What a power cut may lose is what was not fsynced: every file and folder before the rename, the parent after."""
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor: int) -> None:
        log.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        log.append(("rename", str(path)))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    final = save(tmp_path, 1, "a")
    at = next(i for i, (what, _) in enumerate(log) if what == "rename")
    temp = Path(log[at][1])
    written = {temp, *(temp / path.relative_to(final) for path in final.rglob("*"))}
    assert {path for what, path in log[:at] if what == "fsync"} == {str(path) for path in written} and len(written) == 6
    assert ("fsync", str(final.parent)) in log[at:]


def test_a_writer_that_raises_leaves_nothing_behind(tmp_path):
    save(tmp_path, 1, "a")

    def write(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, 2, {}, write, keep=1)
    assert names(tmp_path) == ["000001"]


def test_the_temporary_directory_of_a_living_process_is_left_alone(tmp_path):
    save(tmp_path, 1, "a")
    alive = tmp_path / checkpoint.FOLDER / f".tmp-000009-{os.getppid()}-{checkpoint._born(os.getppid())}"
    reused = tmp_path / checkpoint.FOLDER / f".tmp-000009-{os.getppid()}-0.0"  # same pid, another process
    alive.mkdir()
    reused.mkdir()
    save(tmp_path, 2, "b")
    assert alive.exists() and not reused.exists()


# -- disk full ---------------------------------------------------------------------------------------------------------


def write_tensors(directory: Path) -> None:
    checkpoint.save_tensors(directory / "weights.safetensors", {"w": torch.zeros(100_000)})


@pytest.mark.parametrize("write, file", [
    (writer("x" * 100), "weights.bin"),
    (write_tensors, "weights.safetensors"),
])  # fmt: skip
def test_a_full_disk_is_an_error_with_the_path_and_the_previous_one_stays(tmp_path, child, write, file):
    save(tmp_path, 1, "a", keep=1)

    def attempt() -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with pytest.raises(RunError) as failed:
            checkpoint.save(tmp_path, 2, {}, write, keep=1)
        return str(failed.value)

    code, text = child(attempt)
    assert code == 0, text
    assert str(tmp_path / checkpoint.FOLDER / "000002") in text and "older ones are kept" in text
    assert "File too large" in text
    assert names(tmp_path) == ["000001"] and newest(tmp_path)[2] == []


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / checkpoint.FOLDER).write_text("a file where the folder should be")
    with pytest.raises(RunError, match=rf"{tmp_path / checkpoint.FOLDER}"):
        save(tmp_path, 1, "a")


# -- alterations -------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def edit_manifest(change):
    def damage(directory: Path) -> None:
        path = directory / checkpoint.MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return damage


@pytest.mark.parametrize("damage, message", [
    (lambda d: os.truncate(d / "weights.bin", 17), "weights.bin has 17 bytes, the manifest says 1000"),
    (lambda d: os.truncate(d / "weights.bin", 0), "weights.bin has 0 bytes"),
    (lambda d: flip(d / "weights.bin"), "weights.bin has sha256"),
    (lambda d: flip(d / "optimizer" / "moments.bin"), "optimizer/moments.bin has sha256"),
    (lambda d: flip(d / "state.json"), "state.json has sha256"),
    (lambda d: (d / "weights.bin").unlink(), "weights.bin is missing"),
    (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda d: os.truncate(d / "manifest.json", 30), "manifest.json cannot be read"),
    (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    (edit_manifest(lambda m: m["files"].pop("weights.bin")), "manifest.json was altered"),
    (edit_manifest(lambda m: m["files"].update({"weights.bin": "0" * 64})), "manifest.json was altered"),
    (edit_manifest(lambda m: m["bytes"].update({"weights.bin": 7})), "manifest.json was altered"),
    (edit_manifest(lambda m: m.update(step=7)), "manifest.json was altered"),
    (lambda d: d.rename(d.with_name("000009")), "manifest.json is of step 2"),
])  # fmt: skip
def test_an_alteration_is_named_and_the_one_before_is_used(tmp_path, damage, message):
    save(tmp_path, 1, "a")
    damage(save(tmp_path, 2, "b"))
    directory, state, skipped = newest(tmp_path)
    assert directory.name == "000001" and state["payload"] == "a"
    assert len(skipped) == 1 and message in skipped[0] and "the one before it is used" in skipped[0]


def test_every_byte_of_every_file_counts(tmp_path):
    """One flipped bit anywhere: never accepted, whatever the file."""
    directory = checkpoint.save(tmp_path, 1, {}, lambda d: (d / "w").write_bytes(bytes(range(64))), keep=1)
    for path in directory.iterdir():
        raw = path.read_bytes()
        for i in range(len(raw)):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :])
            assert checkpoint.verify(directory) is not None, (path.name, i)
        path.write_bytes(raw)
    assert checkpoint.verify(directory) is None


def test_a_format_of_another_lpexp_is_named(tmp_path, monkeypatch):
    save(tmp_path, 1, "a")
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save(tmp_path, 2, "b")
    monkeypatch.undo()
    directory, _, skipped = newest(tmp_path)
    assert directory.name == "000001" and "format 2, this lpexp reads 1" in skipped[0]


# -- no pickles --------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os._exit, (66,)


def test_a_pickle_in_the_directory_is_never_loaded(tmp_path):
    save(tmp_path, 1, "a")
    directory = save(tmp_path, 2, "b")
    (directory / "optimizer.pt").write_bytes(pickle.dumps(Bomb()))  # dropped in later: no part of the checkpoint
    assert newest(tmp_path)[0] == directory
    (directory / "state.json").write_bytes(pickle.dumps(Bomb()))
    assert newest(tmp_path)[0].name == "000001"


def test_a_pickle_under_a_tensor_files_name_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    torch.save({"w": torch.zeros(3)}, path)
    with pytest.raises(RunError, match=r"weights\.safetensors is not a complete safetensors file"):
        checkpoint.load_tensors(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(RunError, match=r"weights\.safetensors is not a complete safetensors file"):
        checkpoint.load_tensors(path)


def unpicklers(source: str) -> list[str]:
    """Imports and calls that can run a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [m for m in modules if m.split(".")[0] in ("pickle", "cloudpickle", "joblib", "dill", "shelve")]
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = "weights_only=True" in map(ast.unparse, node.keywords)  # that reads tensors and runs nothing
            found += [] if safe else ["torch.load"]
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append("allow_pickle")
    return found


def test_no_module_of_lpexp_unpickles_a_file():
    assert unpicklers("import torch\ntorch.load('x')") and unpicklers("from pickle import loads")
    modules = list((REPO / "lpexp").rglob("*.py"))
    assert len(modules) > 10
    found = {path.name: names for path in modules if (names := unpicklers(path.read_text()))}
    assert found == {"cluster.py": ["pickle"]}  # messages between a run's own processes, never a file
    assert not re.search(r"(?<![\w.])open\(", (REPO / "lpexp" / "cluster.py").read_text())


# -- tensors -----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8]
DTYPES += [torch.float8_e4m3fn, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_with_their_bits_and_dtype(tmp_path, dtype):
    size = torch.zeros(1, dtype=dtype).element_size()
    bits = torch.randint(0, 256, (6, 10 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = (bits & 1 if dtype == torch.bool else bits).view(dtype)  # NaN payloads and -0 too
    given = {"t": tensor, "transposed": tensor.t(), "slice": tensor[1:3], "scalar": tensor[0, 0], "none": tensor[:0]}
    checkpoint.save_tensors(tmp_path / "t.safetensors", given, {"version": "7"})
    loaded = checkpoint.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == given.keys()
    for name, expected in given.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == expected.shape
        flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (loaded[name], expected)]
        assert torch.equal(*flat), name
    assert checkpoint.load_metadata(tmp_path / "t.safetensors")["version"] == "7"
