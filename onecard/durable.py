"""Files that survive a kill: written whole or not at all. Folders with one owner at a time.

    with replacing("out/run/ckpt.pt") as file:      # a temporary file in the same folder, synced and renamed at the end
        file.write(data)
    with owned("out/run/.lock", "out_dir=out/run"):  # a second process gets an OwnedError that names this one
        ...

Shards, checkpoints and manifests are written this way. train.py and prepare.py own the folder they write to.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from onecard import UserError

TEMPORARY = ".tmp"  # suffix of an unfinished file


class OwnedError(UserError):
    """Another process owns this folder."""


@contextlib.contextmanager
def replacing(path: str | Path, check: Callable | None = None) -> Iterator[IO[bytes]]:
    """Opens a temporary binary file for the body to write, then flushes, syncs and renames it to `path`.

    check: called with the temporary path before the rename; it raises if the content is not what was meant.
    Any exception, a full disk included, removes the temporary file and leaves `path` as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    file = open(temporary, "w+b")  # noqa: SIM115 (closed below, in every case)
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
        with contextlib.suppress(OSError):  # closing flushes, so a full disk fails here a second time
            file.close()
        temporary.unlink(missing_ok=True)


def second_name(path: str | Path, name: str) -> None:
    """Gives the file at `path` a second name in the same folder. An older file of that name is replaced."""
    target = Path(path).with_name(name)
    temporary = target.with_name(f"{name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        os.link(path, temporary)
    except OSError:  # this file system has no hard links: copy
        with open(path, "rb") as original, replacing(target) as copy:
            shutil.copyfileobj(original, copy, 1 << 22)
    else:
        os.replace(temporary, target)
        temporary.unlink(missing_ok=True)  # POSIX rename does nothing if both names are the same file already
        sync_folder(target.parent)


def sync_folder(folder: str | Path) -> None:
    """Makes renames in this folder survive a power cut. (Windows has no such call and needs none.)"""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Removes the unfinished files that a killed process left in a folder. Only the folder's owner may call this."""
    for path in Path(folder).glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):  # not the .tmp files of other programs
        with contextlib.suppress(PermissionError):  # Windows, while a process that is ending still writes it
            path.unlink(missing_ok=True)


def write_refused(path: str | Path, error: OSError, reached: int | None = None) -> str:
    """The message for a write that the system refused. reached: bytes written before that, if known."""
    after = "" if reached is None else f", after {reached:,} bytes"
    folder = Path(path).parent
    free = f"{shutil.disk_usage(folder).free:,} bytes are free there; make room" if folder.is_dir() else ""
    remedy = free or f"its folder {folder} is gone; make it"
    return f"{path}: could not be written ({error.strerror or error}{after}); {remedy} and run it again"


def sha256_of(file: IO[bytes], size: int | None = None) -> str:
    """Hex SHA-256 of an open binary file from its position on, of at most `size` bytes."""
    digest = hashlib.sha256()
    left = sys.maxsize if size is None else size
    while chunk := file.read(min(left, 1 << 20)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def owned(path: str | Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` while the body runs. The lock ends with the process, however that ends.

    Raises OwnedError, with `what` and the process id of another owner; OSError if the folder is read-only.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            lock(descriptor)
        except (BlockingIOError, PermissionError):  # POSIX, Windows; "no locks on this file system" is another error
            owner = os.pread(descriptor, 100, 0).decode() if hasattr(os, "pread") else ""
            raise OwnedError(f"{what} is in use by {owner or 'another process'}: wait for it, or stop it") from None
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # disk full: the lock holds, only the owner's name is missing
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(descriptor)


def lock(descriptor):
    if os.name == "nt":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # after the text: what is locked cannot be read
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
