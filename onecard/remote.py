"""Files here and in stores: hf://, s3://, gs://, https:// and every other scheme of fsspec. Local files do not need it.

    with reading(path), open_file(path) as file: ...

The one thing to know: a request that fails for a passing reason (429, 5xx, a broken connection) is repeated after
growing pauses, in listing, opening and reading. So whoever reads continues after the last byte that came.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from http.client import responses
from typing import Any

from onecard import UserError

PAUSES = (1, 2, 4, 8, 16, 32, 64)  # seconds before a failed request is repeated; the hub's own client repeats too
BLOCK_BYTES = 8 << 20  # of a request, about
EXTRAS = {"hf": "hub", "s3": "s3", "gs": "gs", "https": "https", "http": "https"}  # of pyproject.toml
LASTING = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, IsADirectoryError)
STATUSES = {"PermissionError": 403, "FileNotFoundError": 404, "NoCredentialsError": 401, "DefaultCredentialsError": 401}
LOGINS = {
    "hf": "check the name, and whether it asks to accept terms, at {page}; then run hf auth login, or set HF_TOKEN",
    "s3": "check your keys with aws configure; for a public bucket set FSSPEC_S3_ANON=true",
    "gs": "run gcloud auth application-default login; for a public bucket set FSSPEC_GS_TOKEN=anon",
}


class SourceError(UserError):
    """An input that cannot be used: which, why, and what to do."""


class DamagedError(SourceError):
    """A file that cannot be read. The other files are still prepared, and the exit code is 1."""


class RefusedError(DamagedError):
    """A store has no such file, or does not give it to this user (401, 403, 404)."""


def is_remote(path: str) -> bool:
    return "://" in path


def open_file(path: str) -> Any:
    """A binary file for reading. Raises DamagedError if a store does not give it."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = connect(path)
    file = retried(path, lambda: system.open(name, "rb", block_size=BLOCK_BYTES, cache_type="readahead"))
    if hasattr(file, "cache"):  # a file in memory has none
        if file.size is None:
            raise SourceError(f"{path}: its server does not give parts of a file; download it, and give the local file")
        fetch = file.cache.fetcher
        file.cache.fetcher = lambda start, end: retried(path, lambda: whole(fetch(start, end), end - start))
    return file


def whole(content: bytes, size: int) -> bytes:
    if len(content) < size:
        raise ConnectionError(f"only {len(content):,} of {size:,} bytes came")
    return content


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns an error of the body, which reads a file, into a DamagedError that names the file."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__ != "pyarrow.lib":
            raise
        why, remedy = " ".join(str(error).split()), "if it is cut short or damaged, copy it again"
        raise DamagedError(f"{path}: cannot be read ({why}); {remedy}") from error


def connect(path: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises SourceError, with the command that installs what is missing."""
    scheme = path.partition("://")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(path)
    except ImportError as error:
        remedy = f"pip install -e '.[{EXTRAS[scheme]}]'" if scheme in EXTRAS else "install it with pip"
        raise SourceError(f"{path}: a package is missing ({error}); {remedy}") from error
    except ValueError as error:
        raise SourceError(f"{path}: {error}; use hf://, s3://, gs://, https:// or a local file") from error


def retried(path: str, request: Callable) -> Any:
    """The result of a request, which is repeated while that can help. Raises DamagedError with cause and remedy."""
    for pause in (*PAUSES, None):
        try:
            return request()
        except Exception as error:  # each store has its own
            status, why = cause_of(error)
            passing = status in (408, 425, 429) or status >= 500 if status else not isinstance(error, LASTING)
            if pause is None or not passing:
                kind = RefusedError if status in (401, 403, 404) else DamagedError
                raise kind(f"{path}: cannot be read ({why}); {remedy_for(path, status)}") from error
        if pause >= 8:
            print(f"  {path}: {why}; trying again in {pause} s", file=sys.stderr)
        time.sleep(pause)


def cause_of(error: BaseException) -> tuple[int | None, str]:
    """(HTTP status behind an error, or the one that means the same; the cause in words)."""
    while error.__cause__ and not status_in(error):
        error = error.__cause__
    name, text = type(error).__name__, " ".join(str(error).split())[:200]
    status = status_in(error) or STATUSES.get(name)
    return status, f"HTTP {status} {responses.get(status, '')}" if status else f"{name}: {text}"


def status_in(error: BaseException) -> int | None:
    found = getattr(error, "response", error)
    status = getattr(found, "status_code", getattr(found, "status", None))
    return status if isinstance(status, int) else None


def remedy_for(path: str, status: int | None) -> str:
    scheme, _, name = path.partition("://")
    page = "https://huggingface.co/" + "/".join(name.partition("@")[0].split("/")[:3])  # of the repository
    if status in (401, 403):
        return LOGINS.get(scheme, "download it with your account, and give the local file").format(page=page)
    if status == 404:
        return f"check the name at {page}/tree/main" if scheme == "hf" else "check the name"
    if status == 429:
        login = "run hf auth login, which raises the limit, or " if scheme == "hf" else ""
        return f"{login}wait some minutes and run the same command again with fewer --workers"
    return "check the network, and run the same command again: it continues from here"
