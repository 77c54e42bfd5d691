"""remote.py: a server of our own is the hub and an https store; it fails, refuses and breaks off as it is told."""

import http.server
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest
from texts import rows_of, some_texts, write_parquet

from onecard import remote
from onecard.remote import DamagedError, SourceError
from onecard.sources import examine, find_files

TEXT = {"text_column": "text"}
API, FILES = "/api/datasets/org/data", "/datasets/org/data/resolve/"


class Server(http.server.BaseHTTPRequestHandler):
    """The API of the hub for the repository org/data, and the same files below /files/.

    failures: an answer for each of the next requests: a status, "drop" (no answer) or
    "half" (half of the content); "": a right one. A number in a path is a status too.
    """

    protocol_version = "HTTP/1.1"
    root, failures, ranges, asked = Path(), [], True, 0

    def log_message(self, *_):
        pass

    def answer(self, content, code=200, half=False, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        self.close_connection = half or self.close_connection

    def entry(self, path):
        size, kind = (path.stat().st_size, "file") if path.is_file() else (0, "directory")
        return {"type": kind, "path": path.relative_to(self.root).as_posix(), "oid": "1" * 40, "size": size}

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        self.answer([self.entry(self.root / name) for name in asked if (self.root / name).exists()])

    def do_GET(self):
        url = urlparse(self.path)
        path = unquote(url.path)
        type(self).asked += 1
        status = next((int(part) for part in path.split("/") if part.isdigit()), "")
        failure = self.failures.pop(0) if self.failures else status
        if failure == "drop":
            self.close_connection = True
        elif failure not in ("", "half"):
            self.answer({"error": "refused"}, failure)
        elif path in (API, f"{API}/revision/main"):
            self.answer({"id": "org/data", "sha": "a" * 40, "siblings": [], "tags": []})
        elif path.startswith(f"{API}/tree/main") and (folder := self.below(path, f"{API}/tree/main")).is_dir():
            self.answer([self.entry(p) for p in sorted(folder.glob("*"))])
        elif (file := self.root / path.removeprefix(FILES).removeprefix("main/").removeprefix("/files/")).is_file():
            self.answer_range(file.read_bytes(), failure == "half")
        elif path.startswith("/files/") and file.is_dir():
            links = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in sorted(file.glob("*")))
            self.answer(links.encode(), Content_Type="text/html")
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")

    def below(self, path, start):
        return self.root / path.removeprefix(start).strip("/")

    def answer_range(self, content, half):
        if not self.ranges:
            return self.answer(content, 200, half, Accept_Ranges="none")
        first, last = self.headers.get("Range", f"bytes=0-{len(content) - 1}").removeprefix("bytes=").split("-")
        part = content[int(first) : int(last or len(content)) + 1]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        headers = {"Content_Range": where, "ETag": '"x"', "X_Repo_Commit": "a" * 40, "Accept_Ranges": "bytes"}
        self.answer(part, 206 if "Range" in self.headers else 200, half, **headers)

    do_HEAD = do_GET


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that would have been made."""
    made = []
    monkeypatch.setattr(remote.time, "sleep", made.append)
    return made


@pytest.fixture(params=["hf", "http", "memory"])
def store(request, tmp_path, monkeypatch, pauses):
    """(name of the store, its address, the local folder with the same files)."""
    folder = tmp_path / "store"
    for number in range(2):
        write_parquet(
            folder / f"10BT/sub/{number:03d}.parquet", some_texts(300, number, words=2000), row_group_size=100
        )
    lines = [json.dumps({"text": text}) for text in some_texts(300)]
    (folder / "10BT/a.JSONL").write_text("\n".join(lines))
    (folder / "10BT/b.json").write_text(json.dumps(some_texts(3000)))
    (folder / "10BT/readme.md").write_text("read me")
    (folder / "10BT/.hidden.txt").write_text("x")
    if request.param == "memory":
        fsspec = pytest.importorskip("fsspec")
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), "/store", recursive=True)
        yield "memory", "memory:///store", folder
        memory.rm("/store", recursive=True)
        return
    pytest.importorskip("huggingface_hub" if request.param == "hf" else "aiohttp")
    Server.root, Server.failures, Server.ranges, Server.asked = folder, [], True, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        if request.param == "hf":
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield request.param, "hf://datasets/org/data" if request.param == "hf" else f"{address}/files", folder
        server.shutdown()


def look(path, root):
    """What identifies a file, and its rows: the same here and there."""
    source, units = examine(path, TEXT, 500_000)
    return source | {"path": path.removeprefix(str(root))}, units, rows_of(path, 500_000)


def test_a_store_gives_what_local_files_give_in_spite_of_failures_in_listing_footers_and_reading(store, pauses):
    name, address, folder = store
    names = ["10BT/sub/000.parquet", "10BT/sub/001.parquet", "10BT/a.JSONL", "10BT/b.json"]
    failures = [503, "", 429, "", "drop", "", "half", "", 500, "", 502, "half", "drop", 504, ""]
    for inputs, expected in (("10BT/sub/*.parquet", names[:2]), ("10BT", names[:2]), ("10BT/**/[ab].JS*", names[2:3])):
        Server.failures = failures * 2
        assert find_files([f"{address}/{inputs}"]) == [f"{address}/{path}" for path in expected]
    for path in names:
        Server.failures = failures * 9
        assert look(f"{address}/{path}", address) == look(f"{folder}/{path}", folder)
    assert name == "memory" or len(pauses) > 10
    Server.failures = failures[:12]  # seven failures: as often as one request is repeated, if it meets them all
    with ThreadPoolExecutor(1 if name == "memory" else 8) as threads:  # a file in memory has one position for all
        found = list(threads.map(lambda path: look(f"{address}/{path}", address), names * 4))
    assert found == [look(f"{folder}/{path}", folder) for path in names] * 4


REMEDIES = {
    ("hf", 401): "401 Unauthorized.*huggingface.co/datasets/org/401.*hf auth login, or set HF_TOKEN",
    ("hf", 403): "403 Forbidden.*accept terms, at https://huggingface.co/datasets/org/403;",
    ("hf", 404): "404 Not Found.*check the name at https://huggingface.co/datasets/org/404/tree/main",
    ("hf", 429): "429 Too Many Requests.*hf auth login, which raises the limit, or wait",
    ("hf", 503): "503 Service Unavailable.*check the network",
    ("http", 401): "401 Unauthorized.*download it with your account",
    ("http", 403): "403 Forbidden.*download it with your account",
    ("http", 404): "404 Not Found.*check the name",
    ("http", 429): "429 Too Many Requests.*wait some minutes",
    ("http", 503): "503 Service Unavailable.*check the network",
}


def test_what_is_refused_is_named_with_cause_and_remedy_at_once_and_a_busy_server_after_growing_pauses(store, pauses):
    name, address, _ = store
    for status in (401, 403, 404, 429, 503) if name != "memory" else ():
        base = f"hf://datasets/org/{status}" if name == "hf" else f"{address}/{status}".replace("/files", "")
        for path in (f"{base}/*.parquet", f"{base}/a.parquet"):
            pauses.clear()
            with pytest.raises(SourceError, match=rf"{base}.*cannot be read \(HTTP {REMEDIES[name, status]}") as error:
                examine(find_files([path])[0], TEXT, 1e9)
            assert "\n" not in str(error.value)
            assert [p for p in pauses if p in remote.PAUSES][-7:] == ([*remote.PAUSES] if status in (429, 503) else [])
    with pytest.raises(SourceError, match=r"no\.parquet: cannot be read \(HTTP 404.*check the name"):
        examine(f"{address}/10BT/no.parquet", TEXT, 1e9)


def test_a_server_that_is_not_there_or_gives_no_parts_of_files_is_named(store, pauses):
    if store[0] != "http":
        return
    Server.ranges = False
    with pytest.raises(SourceError, match=r"a\.JSONL: .*does not give parts of a file.*download it"):
        examine(f"{store[1]}/10BT/a.JSONL", TEXT, 1e9)
    with pytest.raises(DamagedError, match=r"http://127\.0\.0\.1:9/a\.parquet: cannot be read .*check the network"):
        examine("http://127.0.0.1:9/a.parquet", TEXT, 1e9)
    assert [*remote.PAUSES] == pauses


def test_a_missing_package_comes_with_the_command_that_installs_it_and_an_unknown_store_with_those_there_are(
    monkeypatch,
):
    registry = pytest.importorskip("fsspec.registry")
    for scheme, module, extra in (("hf", "huggingface_hub", "hub"), ("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs")):
        monkeypatch.setitem(remote.sys.modules, module, None)
        monkeypatch.delitem(registry._registry, scheme, raising=False)
        for path in (f"{scheme}://a/b.parquet", f"{scheme}://a/*.jsonl"):
            with pytest.raises(SourceError, match=rf"{scheme}://a/.*missing.*pip install -e '\.\[{extra}\]'") as error:
                examine(find_files([path])[0], TEXT, 1e9)
            assert "\n" not in str(error.value)
    with pytest.raises(SourceError, match=r"ftq://a/b\.parquet: .*not known.*use hf://"):
        examine("ftq://a/b.parquet", TEXT, 1e9)
