"""One training state on disk: saved whole or not at all, and checked when it is loaded.

`ckpt.pt` is a torch file with the keys that nanoGPT users know (model, optimizer, model_args, iter_num, best_val_loss,
config) and more; torch.load reads it. Behind its end stands a trailer with the SHA-256 of all before it, because
torch.load itself notices hardly any flipped bit. Only tensors and plain Python are in it: nothing of it can run.
"""

import hashlib
import os
import pickle
from pathlib import Path

import torch

from model import GPT, GPTConfig

VERSION = 1
LATEST, BEST = "ckpt.pt", "ckpt_best.pt"
TRAILER = b"onecard sha256 "  # then 64 hexadecimal digits and a newline
TRAILER_BYTES = len(TRAILER) + 65


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or not of this model: which file, why, what to do."""


class _HashingFile:
    """Just enough of a file for torch.save: everything that is written goes into the hash too."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def save(path, state):
    """Writes `state` (nested dicts and lists of tensors and plain Python) so that `path` is the old file or the new."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            hashing = _HashingFile(file)
            torch.save({"version": VERSION, **state}, hashing)
            file.write(TRAILER + hashing.sha256.hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def keep_as(path, name):
    """Gives the file at `path` a second name beside it, without copying its bytes where the file system can do that."""
    path = Path(path)
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    os.link(path, temporary)
    os.replace(temporary, path.with_name(name))
    _sync_folder(path.parent)


def _sync_folder(folder):
    if os.name == "posix":  # Windows has no such call: a rename there is durable by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path):
    """The state that `save` wrote, its tensors on the CPU. Raises CheckpointError if a single bit is not as written."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END) - TRAILER_BYTES
            file.seek(max(size, 0))
            trailer = file.read()
            file.seek(0)
            if size < 0 or not trailer.startswith(TRAILER):
                raise CheckpointError(
                    f"{path}: not a whole onecard checkpoint ({size + TRAILER_BYTES:,} bytes, no SHA-256 at its end)"
                )
            digest = _sha256(file, size)
        if trailer[len(TRAILER) :].strip().decode("ascii", "replace") != digest:
            raise CheckpointError(f"{path}: damaged: its bytes do not have the SHA-256 that was written with them")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: there is no checkpoint here; train first, or give the right --out_dir"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def _sha256(file, size):
    sha256 = hashlib.sha256()
    while size:
        chunk = file.read(min(size, 1 << 22))
        if not chunk:
            break
        sha256.update(chunk)
        size -= len(chunk)
    return sha256.hexdigest()


def load_model(path):
    """-> (GPT with the trained weights on the CPU, in eval mode; the rest of the checkpoint as a dict)."""
    state = load(path)
    model = GPT(GPTConfig(**state["model_args"]))
    model.load_state_dict(state.pop("model"))
    return model.eval(), state
