"""Files that survive a kill: written whole or not at all, and folders that have one owner at a time.

    with replacing("out/run/ckpt.pt") as file:      # a temporary file beside it, synced and renamed at the end
        file.write(data)
    with owned("out/run/.lock", "out_dir=out/run"):  # another process gets an OwnedError that names this one
        ...

Shards, checkpoints and manifests are written like this; train.py and prepare.py own what they write.
"""

import contextlib
import os
import secrets
import shutil
import socket
from pathlib import Path

TEMPORARY = ".tmp"  # what an unfinished file's name ends with; such a file is nobody's once its folder has an owner


class OwnedError(ValueError):
    """Another process works here."""


@contextlib.contextmanager
def replacing(path, mode="w+b", check=None):
    """Opens a temporary file in binary for the body to write; then flushes, syncs and renames it to `path`.

    check: called with the temporary path before the renaming; it raises if what stands there is not what was meant.
    An exception, a full disk's OSError too, removes the temporary file and leaves `path` as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    file = open(temporary, mode)  # noqa: SIM115 (closed below, in every case)
    try:
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if check:
            check(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # closing flushes: a full disk fails it a second time
            file.close()
        temporary.unlink(missing_ok=True)


def second_name(path, name):
    """Gives the file at `path` the name `name` too, in the same folder, replacing what had it."""
    path = Path(path)
    temporary = path.with_name(f"{name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        os.link(path, temporary)
    except OSError:  # a file system without second names: a copy it is
        with open(path, "rb") as original, replacing(path.with_name(name)) as copy:
            shutil.copyfileobj(original, copy, 1 << 22)
        return
    os.replace(temporary, path.with_name(name))
    temporary.unlink(missing_ok=True)  # POSIX: renaming one name of a file to another name of it leaves both
    sync_folder(path.parent)


def sync_folder(folder):
    """Makes a rename in this folder outlast a power cut. (Windows has no such call and needs none.)"""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder):
    """Removes the unfinished files that a killed process left in a folder; for its owner only."""
    for path in Path(folder).glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):  # no other program's
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def owned(path, what):
    """Holds the lock file `path` while the body runs. The lock dies with the process, however that dies.

    Raises OwnedError, with `what` and the owner's process id, if another has it; OSError if the folder is read-only.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        if not try_lock(descriptor):
            holder = os.pread(descriptor, 100, 0).decode() if hasattr(os, "pread") else ""
            raise OwnedError(f"{what} is in use by {holder or 'another process'}: wait for it, or stop it")
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # a full disk: then the owner stays unnamed
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor):
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # behind the text: Windows forbids reading what is locked
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX, Windows; a file system without locks is another error
        return False
    return True
