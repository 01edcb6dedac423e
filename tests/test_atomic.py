"""Files and folders that appear whole: beside other writers, after a kill, and under the names of others."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cat_rs
from cat_rs import atomic

Write = Callable[[Path, int], None]
MODULE, ROWS = "unet.mid_block.attentions.0.proj_in", 64


def write_text(path: Path, number: int) -> None:
    atomic.write_bytes(path, f"{number} ".encode() * 5000)


def read_text(path: Path) -> int:
    first, *others = path.read_bytes().split()
    assert len(others) == 4999
    assert set(others) == {first}
    return int(first)


def write_adapter(path: Path, number: int) -> None:
    lora_A, lora_B = torch.full((2, ROWS), float(number)), torch.full((ROWS, 2), float(number))
    cat_rs.save_lora(path, {f"{MODULE}.lora_A.weight": lora_A, f"{MODULE}.lora_B.weight": lora_B})


def read_adapter(path: Path) -> int:
    values = {value for tensor in load_file(path).values() for value in tensor.unique().tolist()}
    assert len(values) == 1
    return int(values.pop())


def write_folder(path: Path, number: int) -> None:
    with atomic.new_folder(path) as unfinished:
        for name in ("a", "b"):
            write_text(unfinished / name, number)


def read_folder(path: Path) -> int:
    assert [file.name for file in sorted(path.iterdir())] == ["a", "b"]
    first, second = (read_text(path / name) for name in ("a", "b"))
    assert first == second
    return first


def stopped(_result: object) -> None:
    raise ValueError("my own")


KINDS: dict[str, tuple[Write, Callable[[Path], int]]] = {
    "text": (write_text, read_text),
    "adapter": (write_adapter, read_adapter),
    "folder": (write_folder, read_folder),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def target(kind: str, tmp_path: Path) -> Path:
    """Where to write: alone in its folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    return folder / ("target" if kind == "folder" else "target.safetensors")


def test_threads_that_write_one_path(kind: str, target: Path) -> None:
    write, read = KINDS[kind]
    errors: list[BaseException] = []

    def save(number: int, start: threading.Barrier) -> None:
        try:
            start.wait()
            write(target, number)
        except BaseException as error:
            errors.append(error)

    for _ in range(25):
        start = threading.Barrier(4)
        threads = [threading.Thread(target=save, args=(number, start)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert read(target) in range(4)
        assert list(target.parent.iterdir()) == [target]


# Where PyTorch is not needed it is not imported: that takes longer than the tests.
CHILD = """
import importlib.util, os, signal, sys
from pathlib import Path

kind, target, *arguments = sys.argv[1:]
if kind == "adapter":
    from tests.test_atomic import KINDS
    write = KINDS[kind][0]
else:
    spec = importlib.util.spec_from_file_location("atomic", "ATOMIC")
    atomic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(atomic)

    def write_text(path, number):
        atomic.write_bytes(path, f"{number} ".encode() * 5000)

    def write_folder(path, number):
        with atomic.new_folder(path) as unfinished:
            for name in ("a", "b"):
                write_text(unfinished / name, number)

    write = {"text": write_text, "folder": write_folder}[kind]
""".replace("ATOMIC", atomic.__file__)


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def test_processes_that_write_one_path(kind: str, target: Path) -> None:
    script = """
print("ready", flush=True)
sys.stdin.readline()
for _ in range(40):
    write(Path(target), int(arguments[0]))
"""
    writers = [child(script, kind, target, number) for number in range(3)]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        _, errors = writer.communicate(timeout=300)
        assert writer.returncode == 0, errors
    assert KINDS[kind][1](target) in range(3)
    assert list(target.parent.iterdir()) == [target]


def test_all_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(
    kind: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read = KINDS[kind]
    write(target, 1)
    # What is synced, with its size then, and what is renamed to where: by inode.
    events: list[tuple[int, int | Path]] = []
    fsync = os.fsync

    def synced(handle: int) -> None:
        found = os.fstat(handle)
        events.append((found.st_ino, found.st_size))
        fsync(handle)

    def noting(rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def renamed(source: Path, destination: Path) -> None:
            events.append((os.stat(source).st_ino, Path(destination)))
            rename(source, destination)

        return renamed

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        for name in ("rename", "replace"):
            patch.setattr(os, name, noting(getattr(os, name)))
        write(target, 2)
    assert read(target) == 2
    files = [target] if target.is_file() else [target, *target.iterdir()]
    renamed = events.index((target.stat().st_ino, target))
    before, after = events[:renamed], events[renamed + 1 :]
    for file in files:
        found = file.stat()
        assert (found.st_ino, found.st_size) in before, f"{file} was renamed before it was synced whole"
    assert target.parent.stat().st_ino in {inode for inode, _ in after}, "the rename was not synced"


@pytest.mark.parametrize("kind", ["text", "adapter"], indirect=True)
def test_a_planted_link_is_not_followed(kind: str, target: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (target.parent / f"{atomic.TEMPORARY_PREFIX}{target.name}").symlink_to(victim)
    KINDS[kind][0](target, 1)
    assert KINDS[kind][1](target) == 1
    assert victim.read_text() == "mine"


def test_an_error_in_the_middle_keeps_what_was_there(kind: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = KINDS[kind]
    write(target, 1)

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            write(target, 2)
    assert read(target) == 1
    assert list(target.parent.iterdir()) == [target]


def test_an_error_of_the_writer_keeps_what_was_there(tmp_path: Path) -> None:
    write_text(tmp_path / "file", 1)
    write_folder(tmp_path / "folder", 1)
    with pytest.raises(ValueError, match="my own"), atomic.new_file(tmp_path / "file") as file:
        stopped(file.write(b"2"))
    with pytest.raises(ValueError, match="my own"), atomic.new_folder(tmp_path / "folder") as unfinished:
        stopped((unfinished / "a").write_text("2"))
    assert read_text(tmp_path / "file") == read_folder(tmp_path / "folder") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        atomic.write_bytes(tmp_path / "taken", b"")
    assert str(caught.value) == f"[Errno 21] Is a directory: '{tmp_path / 'taken'}'"
    with pytest.raises(FileNotFoundError, match="absent"):
        atomic.write_bytes(tmp_path / "absent" / "file", b"")


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_those_of_plain_files_and_folders(umask: int, tmp_path: Path) -> None:
    for kind, (write, _) in KINDS.items():
        write(tmp_path / f"{kind}.safetensors", 1)
        assert mode(tmp_path / f"{kind}.safetensors") == (0o777 if kind == "folder" else 0o666) & ~umask


@pytest.mark.parametrize("kind", ["text", "adapter"], indirect=True)
def test_a_file_that_is_replaced_keeps_its_permissions(kind: str, target: Path) -> None:
    write, _ = KINDS[kind]
    write(target, 1)
    target.chmod(0o640)
    write(target, 2)
    assert mode(target) == 0o640


def killed_before(kind: str, target: Path, call: str, number: int) -> bool:
    """Whether a process that was to write 2 was killed before its n-th call of a function of `os`."""
    script = """
call, left = arguments[0], int(arguments[1])
before = getattr(os, call)

def kill(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*arguments)

setattr(os, call, kill)
write(Path(target), 2)
"""
    killed = child(script, kind, target, call, number)
    _, errors = killed.communicate(timeout=300)
    assert killed.returncode in (0, -signal.SIGKILL), errors
    return killed.returncode != 0


@pytest.mark.parametrize("kind", ["text", "folder"], indirect=True)
@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_a_killed_writer_leaves_one_of_both(kind: str, target: Path, call: str) -> None:
    write, read = KINDS[kind]
    for number in range(1, 20):
        write(target, 1)
        if not killed_before(kind, target, call, number):
            break
        if kind == "folder" and not target.exists():
            # It stood aside, and the next writer, which fails, puts it back.
            with pytest.raises(ValueError, match="my own"), atomic.new_folder(target):
                stopped(None)
        assert read(target) in (1, 2)
        write(target, 3)
        assert list(target.parent.iterdir()) == [target]
    else:
        pytest.fail("never finished")
    assert read(target) == 2


def test_what_others_are_writing_is_not_taken_for_left_over(tmp_path: Path) -> None:
    with atomic.new_folder(tmp_path / "first") as first, atomic.new_file(tmp_path / "second") as second:
        write_folder(tmp_path / "third", 3)
        write_text(tmp_path / "fourth", 4)
        write_text(first / "a", 1)
        second.write(b"2")
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "third", "fourth"}
    assert read_text(tmp_path / "first" / "a") == 1
    assert (tmp_path / "second").read_bytes() == b"2"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", 1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", 2)
    assert (tmp_path / "link").is_symlink()
    assert read_folder(tmp_path / "real") == 2


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError):
        write_folder(tmp_path / "file", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["half \ud800", "nul \0"])
def test_a_text_that_names_no_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="No name of a file"):
        atomic.write_bytes(tmp_path / name, b"")
    with pytest.raises(OSError, match="No name of a file"), atomic.new_folder(tmp_path / name):
        pass


def test_a_locked_folder_is_anothers_only_afterwards(tmp_path: Path) -> None:
    folder, order, started = tmp_path / "new" / "folder", [], threading.Event()

    def other() -> None:
        started.set()
        with atomic.locked_folder(folder):
            order.append("other")

    thread = threading.Thread(target=other)
    with atomic.locked_folder(folder):
        thread.start()
        started.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "other"]
