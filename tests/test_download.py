"""Downloads from servers that break off, change and lie: made here, on this machine."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

from recsys.cli import main
from recsys.data import download as module
from recsys.data.download import DownloadConfig, RemoteFile, download
from tests.test_cli import error_line

MIB = 1 << 20
CONTENT, OTHER = (os.urandom(3 * MIB + 17) for _ in range(2))
ARCHIVE = "/dac.tar.gz"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Remote:
    """A web server that keeps the rules of HTTP, or breaks them as told."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Path -> content."""
    headers: dict[str, str] = field(default_factory=dict)
    """What says whether a file is the same; its ETag where none is given."""
    knows_range: bool = True
    break_after: list[int] = field(default_factory=list)
    """Bytes after which the next answers break off."""
    statuses: list[int] = field(default_factory=list)
    """What the next requests get instead of an answer."""
    on_break: Any = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Path and headers of each request."""
    num_sent: int = 0
    url: str = ""

    def add_repo(self, repo: str, files: dict[str, bytes]) -> None:
        """Serve a dataset repository of a Hugging Face hub: its listing, and links that lead to another address."""
        entries = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": "0" * 40,
                "lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 134},
            }
            for path, content in files.items()
        ]
        entries.append({"type": "directory", "path": "data", "oid": "1" * 40})
        entries.append({"type": "file", "path": "README.md", "size": 7, "oid": "2" * 40})
        self.files[f"/api/datasets/{repo}/tree/main"] = json.dumps(entries).encode()
        for path, content in files.items():
            self.files[f"/datasets/{repo}/resolve/main/{path}"] = f"/store/{sha256(content)}".encode()
            self.files[f"/store/{sha256(content)}"] = content

    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(handler.path).path)
        self.asked.append((path, dict(handler.headers)))
        if self.statuses:
            handler.send_error(self.statuses.pop(0))
        elif path not in self.files:
            handler.send_error(404)
        elif "/resolve/" in path:
            content = self.files[self.files[path].decode()]
            handler.send_response(302)
            handler.send_header("Location", self.files[path].decode())
            handler.send_header("X-Repo-Commit", "3" * 40)
            handler.send_header("X-Linked-Size", str(len(content)))
            handler.send_header("X-Linked-ETag", f'"{sha256(content)}"')
            handler.end_headers()
        else:
            self.send(handler, self.files[path])

    def send(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        marks = self.headers or {"ETag": f'"{sha256(content)}"'}
        condition = handler.headers.get("If-Range")
        start = 0
        if self.knows_range and "Range" in handler.headers and condition in (None, *marks.values()):
            start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            handler.send_response(200)
        for name, value in marks.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        body = content[start:]
        breaks = bool(self.break_after) and len(body) > 1000  # listings come whole
        body = body[: self.break_after.pop(0)] if breaks else body
        handler.wfile.write(body)
        self.num_sent += len(body)
        if breaks and self.on_break:
            handler.wfile.flush()
            self.on_break()


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    """A server that holds CONTENT as criteo_kaggle; retries do not wait."""
    served = Remote({ARCHIVE: CONTENT})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:  # a client that hung up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.0)
    checksum = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
    monkeypatch.setattr(module, "CRITEO_KAGGLE", RemoteFile("dac.tar.gz", served.url, len(CONTENT), checksum))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def kaggle(remote: Remote, out: Path) -> list[str]:
    return ["data", "download", "criteo_kaggle", "--out", str(out), "--endpoint", remote.url]


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_file_comes_whole_once(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "folder"
    assert main(kaggle(remote, out)) == 0
    record = f"{sha256(CONTENT)}  dac.tar.gz\n"
    said = capsys.readouterr().out
    assert said.startswith(f"sha256 {record}{out}: fetched {len(CONTENT):,} bytes (files: 1)\n")
    assert "`tar -xzf dac.tar.gz`" in said
    assert names(out) == ["dac.tar.gz", "dac.tar.gz.sha256"]
    assert (out / "dac.tar.gz").read_bytes() == CONTENT
    assert (out / "dac.tar.gz.sha256").read_text() == record

    assert main(kaggle(remote, out)) == 0
    assert capsys.readouterr().out.startswith(f"{out}: all was there\n")
    assert remote.paths() == [ARCHIVE]


@pytest.mark.parametrize(
    "headers", [{}, {"Last-Modified": "Mon, 02 Mar 2015 00:00:00 GMT"}, {"ETag": 'W/"1"', "Last-Modified": "then"}]
)
def test_a_broken_connection_is_continued(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(module, "RETRIES", 1)  # in a row
    remote.headers = headers
    remote.break_after = [MIB + 5, MIB + 5]
    assert main(kaggle(remote, tmp_path)) == 0
    assert (tmp_path / "dac.tar.gz").read_bytes() == CONTENT
    assert names(tmp_path) == ["dac.tar.gz", "dac.tar.gz.sha256"]
    (_, first), *others = remote.asked
    assert "Range" not in first
    mark = headers.get("Last-Modified", f'"{sha256(CONTENT)}"')
    assert len(others) == 2
    for num_breaks, (_, asked) in enumerate(others, start=1):
        assert asked["If-Range"] == mark
        assert int(asked["Range"].removeprefix("bytes=").removesuffix("-")) >= num_breaks * MIB


@pytest.mark.parametrize(("knows_range", "headers"), [(False, {}), (True, {"ETag": 'W/"1"'})])
def test_a_server_that_cannot_continue_sends_all_again(
    remote: Remote, tmp_path: Path, knows_range: bool, headers: dict[str, str]
) -> None:
    remote.knows_range, remote.headers = knows_range, headers
    remote.break_after = [2 * MIB + 5]
    assert main(kaggle(remote, tmp_path)) == 0
    assert (tmp_path / "dac.tar.gz").read_bytes() == CONTENT
    assert remote.num_sent == 2 * MIB + 5 + len(CONTENT)


def test_the_next_run_continues_what_one_left(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "RETRIES", 0)
    remote.break_after = [2 * MIB + 5]
    line = error_line(capsys, *kaggle(remote, tmp_path))
    partial = tmp_path / "dac.tar.gz.partial"
    have = partial.stat().st_size
    assert have >= 2 * MIB
    assert f"{remote.url}{ARCHIVE}: broke off after {have:,} of {len(CONTENT):,} bytes" in line
    assert line.endswith("; the same command continues")
    assert not (tmp_path / "dac.tar.gz").exists()
    assert main(kaggle(remote, tmp_path)) == 0
    assert remote.asked[-1][1]["Range"] == f"bytes={have}-"
    assert (tmp_path / "dac.tar.gz").read_bytes() == CONTENT


def test_bytes_that_are_all_there_are_not_asked_for(remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "dac.tar.gz.partial").write_bytes(CONTENT)
    assert main(kaggle(remote, tmp_path)) == 0
    assert (tmp_path / "dac.tar.gz").read_bytes() == CONTENT
    assert remote.asked == []


def test_a_remote_file_that_changed_comes_anew(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "RETRIES", 0)
    arguments = ["data", "download", "avazu", "--out", str(tmp_path), "--endpoint", remote.url]
    remote.headers = {"ETag": '"old"'}
    remote.break_after = [2 * MIB]
    remote.add_repo("reczoo/Avazu_x4", {"Avazu_x4.zip": CONTENT})
    assert "broke off" in error_line(capsys, *arguments)
    remote.headers = {"ETag": '"new"'}
    remote.add_repo("reczoo/Avazu_x4", {"Avazu_x4.zip": OTHER})
    assert main(arguments) == 0
    assert remote.asked[-1][1]["If-Range"] == '"old"'
    assert (tmp_path / "Avazu_x4.zip").read_bytes() == OTHER
    assert "shuffled" in capsys.readouterr().out
    assert names(tmp_path) == ["Avazu_x4.zip"]


def test_wrong_bytes_are_not_kept(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote.files[ARCHIVE] = OTHER
    assert error_line(capsys, *kaggle(remote, tmp_path)) == (
        f"{remote.url}{ARCHIVE}: what came is not {module.CRITEO_KAGGLE.checksum}; the same command fetches it anew"
    )
    assert names(tmp_path) == []


def test_a_file_of_another_size_is_refused_at_once(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.files[ARCHIVE] = b"<html>Please sign in</html>"
    assert error_line(capsys, *kaggle(remote, tmp_path)) == (
        f"{remote.url}{ARCHIVE}: 27 bytes, the published file has {len(CONTENT):,}"
    )
    assert names(tmp_path) == []


def test_a_file_that_is_not_there(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del remote.files[ARCHIVE]
    assert error_line(capsys, *kaggle(remote, tmp_path)) == (
        f"{remote.url}{ARCHIVE}: 404 Not Found; --endpoint names a mirror"
    )
    assert remote.paths() == [ARCHIVE]


def test_a_server_that_is_busy_is_asked_again(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote.statuses = [503, 429, 500]
    assert main(kaggle(remote, tmp_path)) == 0
    assert (tmp_path / "dac.tar.gz").read_bytes() == CONTENT
    (tmp_path / "dac.tar.gz").unlink()
    capsys.readouterr()
    remote.statuses = [503] * (module.RETRIES + 1)
    assert error_line(capsys, *kaggle(remote, tmp_path)).startswith(
        f"{remote.url}{ARCHIVE}: broke off after 0 of {len(CONTENT):,} bytes (Service Unavailable)"
    )


def test_a_server_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(module, "RETRIES", 0)
    line = error_line(
        capsys, "data", "download", "criteo_kaggle", "--out", str(tmp_path), "--endpoint", "http://127.0.0.1:1"
    )
    assert "(ConnectionError)" in line


def test_a_disk_that_is_too_full_is_told_beforehand(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dac.tar.gz.partial").write_bytes(CONTENT[:17])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * MIB - 1))
    assert error_line(capsys, *kaggle(remote, tmp_path)) == (
        f"{tmp_path}: needs {3 * MIB:,} bytes, {3 * MIB - 1:,} are free; name an --out with more room"
    )
    assert remote.asked == []


def test_ctrl_c_leaves_what_came(remote: Remote, tmp_path: Path) -> None:
    remote.add_repo("reczoo/Avazu_x4", {"Avazu_x4.zip": CONTENT})
    remote.break_after = [2 * MIB]
    arguments = ["data", "download", "avazu", "--out", str(tmp_path), "--endpoint", remote.url]
    process = subprocess.Popen([sys.executable, "-m", "recsys", *arguments], stderr=subprocess.PIPE, text=True)

    def interrupt() -> None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)

    remote.on_break = interrupt
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert names(tmp_path) == ["Avazu_x4.zip.partial", "Avazu_x4.zip.partial.validator"]
    assert main(arguments) == 0
    assert (tmp_path / "Avazu_x4.zip").read_bytes() == CONTENT


def days_by_date(*days: int) -> dict[str, bytes]:
    return {
        f"data/day=2015-02-{15 + day}/part-0000{part}-99c3.c000.snappy.parquet": f"{day}, {part}".encode() * 99
        for day in days
        for part in range(3)
    }


def clicks(remote: Remote, out: Path, *days: int) -> DownloadConfig:
    return DownloadConfig(name="criteo_1tb", out=out, days=days, endpoint=remote.url)


def test_days_of_the_hub(remote: Remote, tmp_path: Path) -> None:
    repo = days_by_date(0, 1, 2)
    remote.add_repo(
        "criteo/CriteoClickLogs", {**repo, "day_0.gz": b"cut off", "data/day=2015-02-15/notes.txt": b"no data"}
    )
    wanted = {name: content for name, content in repo.items() if "day=2015-02-16" not in name}
    assert sorted(file.name for file in download(clicks(remote, tmp_path, 2, 0))) == sorted(wanted)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == wanted

    remote.asked.clear()
    damaged, missing, *_ = wanted
    (tmp_path / damaged).write_bytes(bytes(len(wanted[damaged])))
    (tmp_path / missing).unlink()
    assert [file.name for file in download(clicks(remote, tmp_path, 0, 2))] == [damaged, missing]
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == wanted
    assert sum("/resolve/" in path for path in remote.paths()) == 2


def test_all_days_by_number(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = {f"day_{day}.gz": str(day).encode() for day in range(24)}
    remote.add_repo("criteo/CriteoClickLogs", repo)
    assert main(["data", "download", "criteo_1tb", "--out", str(tmp_path), "--endpoint", remote.url]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == repo
    assert capsys.readouterr().out.startswith(f"{tmp_path}: fetched 38 bytes (files: 24)\n")


def test_no_token_leaves_this_machine(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    remote.add_repo("criteo/CriteoClickLogs", days_by_date(0))
    assert len(download(clicks(remote, tmp_path, 0))) == 3
    assert len(remote.asked) == 7
    assert not any("secret" in str(headers) for _, headers in remote.asked)


def test_days_that_the_hub_lacks(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote.add_repo("criteo/CriteoClickLogs", days_by_date(2, 3))
    arguments = ["data", "download", "criteo_1tb", "--out", str(tmp_path), "--endpoint", remote.url]
    assert error_line(capsys, *arguments, "--days", "1", "2", "4") == (
        "criteo/CriteoClickLogs lacks days [1, 4], it has [2, 3]: name some with --days"
    )
    remote.add_repo("reczoo/Avazu_x4", {"train.csv": b"id"})
    assert error_line(capsys, "data", "download", "avazu", "--endpoint", remote.url) == (
        "reczoo/Avazu_x4 lacks Avazu_x4.zip; --endpoint names a mirror"
    )


def test_a_hub_without_the_repository(remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "data", "download", "criteo_1tb", "--out", str(tmp_path), "--endpoint", remote.url)
    assert line.startswith(f"cannot list {remote.url}/datasets/criteo/CriteoClickLogs: ")
    assert "404" in line
    assert line.endswith("; --endpoint names a mirror")


def test_one_file_that_fails_stops_the_others(
    remote: Remote, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = {f"day_{day}.gz": os.urandom(2000) for day in range(24)}
    remote.add_repo("criteo/CriteoClickLogs", repo)
    link = "/datasets/criteo/CriteoClickLogs/resolve/main/day_3.gz"
    target = remote.files.pop(link)
    arguments = ["data", "download", "criteo_1tb", "--out", str(tmp_path), "--endpoint", remote.url]
    assert error_line(capsys, *arguments) == f"{remote.url}{link}: 404 Not Found; --endpoint names a mirror"
    remote.files[link] = target
    assert main(arguments) == 0
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == repo


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["criteo_1t"], "unknown dataset 'criteo_1t'; did you mean criteo_1tb or"),
        (["avazu", "--days", "0"], "--days takes some days of criteo_1tb; avazu is one file"),
        (["criteo_1tb", "--days", "3", "24"], "--days 24: the days are 0 to 23"),
        (["avazu", "--endpoint", "localhost:1"], "--endpoint localhost:1 is no address like https://example.org"),
        (["avazu", "--endpoint", "http://localhost/"], "--endpoint http://localhost/ is no address like"),
        (["avazu", "--out", "memory://logs"], "--out memory://logs: a download goes to a folder of this machine"),
    ],
)
def test_what_cannot_work_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert error_line(capsys, "data", "download", *arguments).startswith(message)


def test_where_files_go_and_come_from() -> None:
    config = DownloadConfig(name="criteo_kaggle")
    assert config.folder == Path("data/raw/criteo_kaggle")
    assert module.SOURCES["criteo_kaggle"](config) == [module.CRITEO_KAGGLE]
    mirrored = replace(config, endpoint="https://example.org/files")
    assert [file.url for file in module.SOURCES["criteo_kaggle"](mirrored)] == ["https://example.org/files/dac.tar.gz"]
