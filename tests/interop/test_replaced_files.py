"""A file is replaced as a whole or not at all, whatever happens, and only where a regular file may be."""

import errno
import os
import re
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from interrupts import interrupted_everywhere

from optimjax._facade import files
from optimjax._facade.files import load, save

pytestmark = pytest.mark.usefixtures("folder")


def test_a_file_has_the_permissions_of_any_new_file_and_keeps_those_it_has() -> None:
    save("a.safetensors", {"x": np.ones(2)})
    Path("b").touch()
    assert os.stat("a.safetensors").st_mode == os.stat("b").st_mode
    for mode in (0o600, 0o400, 0o664):
        os.chmod("a.safetensors", mode)
        save("a.safetensors", {"mode": mode})
        assert os.stat("a.safetensors").st_mode & 0o777 == mode
        assert load("a.safetensors") == {"mode": mode}


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_one(exists: bool) -> None:
    os.mkdir("store")
    if exists:
        save("store/a.safetensors", {"n": 1})
    os.symlink("store/a.safetensors", "latest.safetensors")
    save("latest.safetensors", {"n": 2})
    assert os.path.islink("latest.safetensors")
    assert load("store/a.safetensors") == load("latest.safetensors") == {"n": 2}
    assert os.listdir("store") == ["a.safetensors"]


def test_a_name_as_long_as_names_can_be() -> None:
    name = "n" * 243 + ".safetensors"
    save(name, {"n": 1})
    assert load(name) == {"n": 1}
    assert os.listdir() == [name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
def test_only_a_regular_file_is_replaced() -> None:
    os.mkfifo("fifo")
    os.mkdir("folder")
    os.symlink("loop", "loop")
    os.symlink("/dev/null", "null")
    bound = socket.socket(socket.AF_UNIX)
    bound.bind("socket")
    for path, error, message in (
        ("fifo", OSError, "cannot save to what is not a regular file: 'fifo'"),
        ("folder", IsADirectoryError, "cannot save to what is not a regular file: 'folder'"),
        ("loop", OSError, "symbolic links"),
        ("null", OSError, "cannot save to what is not a regular file: 'null'"),
        ("socket", OSError, "cannot save to what is not a regular file: 'socket'"),
    ):
        mode = os.lstat(path).st_mode
        with pytest.raises(error, match=message):
            save(path, {"n": 1})
        assert os.lstat(path).st_mode == mode
    bound.close()
    assert sorted(os.listdir()) == ["fifo", "folder", "loop", "null", "socket"]
    with pytest.raises(ValueError, match="has written: it is not a regular file"):
        load("fifo")  # without waiting for somebody to write into it


def test_a_full_disk_is_an_oserror_and_leaves_the_file() -> None:
    resource = pytest.importorskip("resource")
    save("a.safetensors", {"before": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        for array in (np.ones(100_000), np.ones((1000, 2000))[:, ::2]):
            with pytest.raises(OSError, match=r"I/O error: File too large .*/a\.safetensors") as caught:
                save("a.safetensors", {"x": array})
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]


@pytest.mark.parametrize(
    ("text", "kind", "number"),
    [
        ("I/O error: Permission denied (os error 13)", PermissionError, errno.EACCES),
        ("something else went wrong", OSError, errno.EIO),
    ],
)
def test_what_the_library_fails_to_write_is_an_oserror(
    monkeypatch: pytest.MonkeyPatch, text: str, kind: type[OSError], number: int
) -> None:
    def fails(tensors: Any, path: Path, metadata: Any) -> None:
        raise safetensors.SafetensorError(text)

    save("a.safetensors", {"before": 1})
    monkeypatch.setattr(safetensors.numpy, "save_file", fails)
    with pytest.raises(kind, match=re.escape(text)) as caught:
        save("a.safetensors", {"n": 2})
    assert caught.value.errno == number
    assert load("a.safetensors") == {"before": 1}
    assert os.listdir() == ["a.safetensors"]


def test_nobody_else_can_read_what_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    modes, save_file = [], safetensors.numpy.save_file

    def watched(tensors: Any, path: Path, metadata: Any) -> None:
        modes.append(path.stat().st_mode)
        save_file(tensors, path, metadata)
        modes.append(path.stat().st_mode)

    monkeypatch.setattr(safetensors.numpy, "save_file", watched)
    save("a.safetensors", {"n": 1})
    assert [mode & 0o777 for mode in modes] == [0o600, 0o600]


def test_the_folder_is_written_to_the_disk_after_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), os.path.exists("a.safetensors")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    save("a.safetensors", {"n": 1})
    assert synced == [(False, False), (True, True)]

    def fails(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("not on this system")

    monkeypatch.setattr(os, "fsync", fails)
    save("a.safetensors", {"n": 2})
    assert load("a.safetensors") == {"n": 2}


# At the end of a `with` the file is closed when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_the_old_file_or_the_new_one() -> None:
    save("a.safetensors", {"n": 1, "x": np.ones(2)})
    outcomes = []
    for interrupted in interrupted_everywhere(files, lambda: save("a.safetensors", {"n": 2, "x": np.ones(2)})):
        outcomes.append((interrupted, load("a.safetensors")["n"]))
        assert os.listdir() == ["a.safetensors"]
        save("a.safetensors", {"n": 1, "x": np.ones(2)})
    assert outcomes[-1] == (False, 2)
    assert outcomes.count((True, 1)) > 50


def test_killing_the_process_during_a_save_leaves_a_whole_file() -> None:
    program = """
    import numpy as np
    from optimjax._facade.files import save
    for count in range(10**6):
        save("run.safetensors", {"count": count, "array": np.full(200_000, count)})
    """
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
        while not Path("run.safetensors").exists():
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(delay)
        process.kill()
        process.wait()
        saved = load("run.safetensors")
        assert (saved["array"] == saved["count"]).all()
