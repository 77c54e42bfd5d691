"""Files that survive, and locks: the harms are really done, by other processes, limits and file systems."""

import hashlib
import io
import os
import re
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


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    return path


def test_a_file_is_the_old_one_until_the_new_one_is_whole(old, tmp_path):
    with durable.replacing(old) as file:
        file.write(b"new")
        assert old.read_bytes() == b"old" and len(names(tmp_path)) == 2
    assert old.read_bytes() == b"new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize("harm", ["body", "check", "File too large"])
def test_what_fails_leaves_the_old_file_alone_and_a_refused_write_is_named_with_the_free_bytes(old, tmp_path, harm):
    """The third is a limit on the size of a file; test_prepare.py and test_metrics.py have disks that are full."""

    def fail(temporary):
        assert temporary.read_bytes() == b"new"  # the check sees what was written
        raise OSError("check")

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=harm) as raised, durable.replacing(old, check=fail) as file:
            file.write(bytes(1001) if harm == "File too large" else b"new")
            if harm == "body":
                raise OSError("body")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert old.read_bytes() == b"old" and names(tmp_path) == ["file"]
    message = rf"/file: could not be written \({harm}, after 1,000 bytes\); [\d,]{{9,}} bytes are free .*make room"
    assert re.search(message, durable.write_refused(old, raised.value, 1000))
    gone = f"({harm}); its folder /no folder is gone; make it and run it again"
    assert gone in durable.write_refused("/no folder/file", raised.value)


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_is_the_same_file_or_a_copy_and_replaces_what_had_it(old, tmp_path, monkeypatch, links):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")  # what exFAT says

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "new").write_bytes(b"new" * 1000)
    for _ in range(2):  # the second time it has that name already
        durable.second_name(tmp_path / "new", "file")
    assert names(tmp_path) == ["file", "new"] and old.read_bytes() == b"new" * 1000
    assert old.samefile(tmp_path / "new") == links


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


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20, None])
def test_sha256_is_of_the_bytes_from_the_position_on_up_to_the_size(size):
    content = os.urandom((5 << 20) // 2)
    file = io.BytesIO(content)
    file.seek(7)
    assert durable.sha256_of(file, size) == hashlib.sha256(content[7:][:size]).hexdigest()


OWNER = """
import subprocess, sys, time
from onecard import durable
with durable.owned(sys.argv[1], "the folder"):
    subprocess.Popen(["sleep", "60"])  # a child that outlives it does not keep the lock
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_owner_is_told_the_firsts_process_id_and_a_kill_frees_the_folder(tmp_path):
    lock, pipes = tmp_path / ".lock", {"stdout": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen([sys.executable, "-c", OWNER, lock], cwd=ROOT, **pipes) as owner:
        try:
            assert owner.stdout.readline() == b"held\n"
            refused = pytest.raises(durable.OwnedError, match=rf"the folder is in use by process {owner.pid} on ")
            for _ in range(2):  # to be refused changes nothing
                with refused, durable.owned(lock, "the folder"):
                    raise AssertionError("two owners")
            owner.kill()
            owner.wait()
            with pytest.raises(KeyError), durable.owned(lock, "the folder"):
                assert f"process {os.getpid()} on " in lock.read_text()
                raise KeyError
            for _ in range(2):  # free after its body, whether that ended well or not
                with durable.owned(lock, "the folder"):
                    pass
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


def test_a_read_only_folder_is_an_error_of_the_system_not_an_owner(small_disk):
    folder = small_disk(64 * 1024, ",ro")
    with pytest.raises(OSError, match="Read-only"), durable.owned(folder / ".lock", "it"):
        pass
