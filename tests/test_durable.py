"""Files that survive, and locks: the harms are really done, by other processes, limits and file systems."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onecard import durable

ROOT = Path(durable.__file__).parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="kills, limits and mounts as POSIX has them")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with durable.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old" and len(names(tmp_path)) == 2
    assert path.read_bytes() == b"new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("where", ["body", "check"])
def test_an_exception_leaves_the_old_file_alone(tmp_path, where):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(temporary):
        assert temporary.read_bytes() == b"new"  # the check sees what was written
        raise KeyError("check")

    with pytest.raises(KeyError, match=where), durable.replacing(path, check=fail) as file:
        file.write(b"new")
        if where == "body":
            raise KeyError("body")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_alone(small_disk):
    path = small_disk(64 * 1024) / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"), durable.replacing(path) as file:
        for _ in range(100):
            file.write(bytes(1024))
    assert path.read_bytes() == b"old" and names(path.parent) == ["file"]


def test_a_limit_on_file_size_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), durable.replacing(path) as file:
            file.write(bytes(1001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_second_name_is_the_same_file_and_replaces_what_had_it(tmp_path):
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "latest").write_bytes(b"old")
    for _ in range(2):  # the second time it has that name already
        durable.second_name(tmp_path / "new", "latest")
    assert names(tmp_path) == ["latest", "new"] and (tmp_path / "latest").read_bytes() == b"new"
    assert (tmp_path / "latest").stat().st_ino == (tmp_path / "new").stat().st_ino


def test_where_files_cannot_have_two_names_it_is_a_copy(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")  # what exFAT says

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "new").write_bytes(b"new" * 1000)
    (tmp_path / "latest").write_bytes(b"old")
    durable.second_name(tmp_path / "new", "latest")
    assert names(tmp_path) == ["latest", "new"] and (tmp_path / "latest").read_bytes() == b"new" * 1000


def test_leftovers_are_removed_and_files_of_others_are_not(tmp_path):
    code = f"""
import os, signal
from onecard import durable
with durable.replacing({str(tmp_path / "ckpt.pt")!r}) as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1  # a temporary file, and nothing under the final name
    kept = ["ckpt.pt", "notes.tmp", "report.2026-01.tmp"]
    for name in kept:
        (tmp_path / name).touch()
    durable.remove_leftovers(tmp_path)
    assert names(tmp_path) == kept


HOLDER = """
import subprocess, sys, time
from onecard import durable
with durable.owned(sys.argv[1], "the folder"):
    subprocess.Popen(["sleep", "60"])  # a child that outlives it does not keep the lock
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_owner_is_told_the_firsts_process_id_and_a_kill_frees_the_folder(tmp_path):
    lock = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, lock]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            for _ in range(2):  # having been refused changes nothing
                with (
                    pytest.raises(durable.OwnedError, match=rf"the folder is in use by process {holder.pid} on "),
                    durable.owned(lock, "the folder"),
                ):
                    raise AssertionError("two owners")
            holder.kill()
            holder.wait()
            with durable.owned(lock, "the folder"):
                assert f"process {os.getpid()} on " in lock.read_text()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_is_free_after_its_body_whether_that_ended_well_or_not(tmp_path):
    with pytest.raises(KeyError), durable.owned(tmp_path / ".lock", "it"):
        raise KeyError
    for _ in range(2):
        with durable.owned(tmp_path / ".lock", "it"):
            pass


def test_a_read_only_folder_is_an_error_of_the_system_not_an_owner(small_disk):
    folder = small_disk(64 * 1024, ",ro")
    with pytest.raises(OSError, match="Read-only"), durable.owned(folder / ".lock", "it"):
        pass
