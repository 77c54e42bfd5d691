"""Files here and on the hub.

with reading(path), open_file(path) as file: ...
"""

import contextlib

from onecard import UserError


class SourceError(UserError):
    """An input that cannot be used: which, why, and what to do."""


class DamagedError(SourceError):
    """A file that cannot be read. The other files are still prepared, and the exit code is 1."""


def hub():
    """Hugging Face's file system. It reads ranges of files and repeats failed requests."""
    try:
        from huggingface_hub import HfFileSystem
    except ImportError as error:
        raise SourceError("hf:// paths need huggingface_hub: pip install -e '.[hub]'") from error
    return HfFileSystem()


def open_file(path):
    return hub().open(path, "rb") if path.startswith("hf://") else open(path, "rb")


@contextlib.contextmanager
def reading(path):
    """Turns an error of the body, which reads a file, into a DamagedError that names the file."""
    try:
        yield
    except SourceError:
        raise
    except Exception as error:
        import pyarrow as pa  # here, so that prepare.py --verify starts none of its threads

        remote = path.startswith("hf://")
        if not remote and not isinstance(error, OSError | pa.ArrowException):  # the hub client's differ by version
            raise
        remedy = "check its name and the network" if remote else "if it is cut short or damaged, copy it again"
        raise DamagedError(f"{path}: cannot be read ({error}); {remedy}") from error
