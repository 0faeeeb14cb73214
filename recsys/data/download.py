"""Public click logs, fetched: what broke off continues, what came is checked, and only a whole file takes its name.

A source lists its files with sizes and checksums; one function fetches a file, wherever it lies. The Hugging Face hub's
client lists the hub's files, but does not fetch them: what breaks off, it starts anew (huggingface_hub issue 4196).
"""

import hashlib
import re
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import requests
from tyro.conf import Positional

from recsys.config import InputError, nearest, write_whole
from recsys.place import Place, is_local
from recsys.progress import progress

CONNECTIONS = 8  # Files fetched at once.
TIMEOUT_S = 30.0  # Without a byte.
RETRIES = 6  # In a row, without a byte gained.
FIRST_WAIT_S = 1.0  # Doubles with each retry.

# Since 2026 Criteo's repository holds Parquet by date, data/day=2015-02-15/part-00015-....snappy.parquet: 6,029 files,
# 276 GB. Before, it held day_0.gz to day_23.gz, as copies of it may still: cut off at a tenth (dlrm issue 413).
BY_DATE = re.compile(r"data/day=(\d{4}-\d{2}-\d{2})/[\w.-]+\.parquet")
BY_NUMBER = re.compile(r"(?:[\w-]+/)*day_(\d+)\.gz")
FIRST_DATE, NUM_DAYS = date(2015, 2, 15), 24


@dataclass(frozen=True)
class RemoteFile:
    """A file to fetch to `name` below the output folder, and how to know that it came whole."""

    name: str
    url: str
    size: int
    checksum: str
    """`sha256:...`, or `md5:...` where no sha256 is published."""


# Criteo's own link; it leads to criteostorage.blob.core.windows.net. No sha256 is published; this is the MD5 that
# figshare (5732310) and a decade of scripts give for dac.tar.gz.
CRITEO_KAGGLE = RemoteFile(
    name="dac.tar.gz",
    url="https://go.criteo.net/criteo-research-kaggle-display-advertising-challenge-dataset.tar.gz",
    size=4_576_820_670,
    checksum="md5:df9b1b3766d9ff91d5ca3eb3d23bed27",
)


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Which public click log to fetch. The same command continues a download that broke off."""

    name: Positional[str]
    """criteo_1tb, criteo_kaggle or avazu."""
    out: Place | None = None
    """Folder for the files; data/raw/NAME where none is named."""
    days: tuple[int, ...] = ()
    """Days of criteo_1tb, 0 to 23; all where none is named."""
    endpoint: str | None = None
    """A mirror: the address of a copy of huggingface.co, or for criteo_kaggle of a folder that holds dac.tar.gz."""

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise InputError(f"unknown dataset {self.name!r}; {nearest(self.name, SOURCES)}")
        if self.days and self.name != "criteo_1tb":
            raise InputError(f"--days takes some days of criteo_1tb; {self.name} is one file")
        if beyond := set(self.days) - set(range(NUM_DAYS)):
            raise InputError(f"--days {min(beyond)}: the days are 0 to {NUM_DAYS - 1}")
        if self.endpoint is not None and not re.fullmatch(r"https?://\S+[^/\s]", self.endpoint):
            raise InputError(f"--endpoint {self.endpoint} is no address like https://example.org (no / at its end)")
        if not is_local(self.folder):
            raise InputError(f"--out {self.out}: a download goes to a folder of this machine")

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.out or Path("data/raw") / self.name


def download(config: DownloadConfig) -> list[RemoteFile]:
    """Fetch the files of a dataset that are not there, whole; returns those that it fetched.

    Raises:
        InputError: a file is not where it should be, is another than the published one, or does not fit on the disk;
            the connection breaks again and again.
    """
    files, folder = SOURCES[config.name](config), config.folder
    there = [file for file in files if _size(folder / file.name) == file.size]
    total, whole = sum(file.size for file in there), set()
    with progress("check", total=total, unit="B", show=total > 0) as advance, ThreadPoolExecutor(CONNECTIONS) as pool:
        for file, right in zip(there, pool.map(lambda file: _is_right(file, folder / file.name), there), strict=True):
            advance(file.size, file.name)
            if right:
                whole.add(file)
    missing = [file for file in files if file not in whole]
    if missing:
        _fetch_all(missing, folder)
    return missing


def _criteo_1tb(config: DownloadConfig) -> list[RemoteFile]:
    """24 days of Criteo's traffic, 4.4 billion rows (CC BY-NC-SA 4.0)."""
    by_date, by_number = defaultdict(list), defaultdict(list)
    for file in _list_hub("criteo/CriteoClickLogs", config.endpoint):
        if found := BY_DATE.fullmatch(file.name):
            by_date[(date.fromisoformat(found[1]) - FIRST_DATE).days].append(file)
        elif found := BY_NUMBER.fullmatch(file.name):
            by_number[int(found[1])].append(file)
    days = by_date or by_number
    wanted = sorted(set(config.days or range(NUM_DAYS)))
    if absent := [day for day in wanted if day not in days]:
        raise InputError(f"criteo/CriteoClickLogs lacks days {absent}, it has {sorted(days)}: name some with --days")
    return [file for day in wanted for file in days[day]]


def _criteo_kaggle(config: DownloadConfig) -> list[RemoteFile]:
    """The log of the Display Advertising Challenge (CC BY-NC-SA 4.0): `tar -xzf dac.tar.gz` gives train.txt."""
    mirrored = replace(CRITEO_KAGGLE, url=f"{config.endpoint}/{CRITEO_KAGGLE.name}")
    return [mirrored if config.endpoint else CRITEO_KAGGLE]


def _avazu(config: DownloadConfig) -> list[RemoteFile]:
    """Avazu's labelled rows as BARS shuffled and split them (8:1:1); train.gz in time order needs a Kaggle account."""
    files = [file for file in _list_hub("reczoo/Avazu_x4", config.endpoint) if file.name == "Avazu_x4.zip"]
    if not files:
        raise InputError("reczoo/Avazu_x4 lacks Avazu_x4.zip; --endpoint names a mirror")
    return files


SOURCES = {"criteo_1tb": _criteo_1tb, "criteo_kaggle": _criteo_kaggle, "avazu": _avazu}


def _list_hub(repo: str, endpoint: str | None) -> list[RemoteFile]:
    from huggingface_hub import HfApi, RepoFile, hf_hub_url  # noqa: PLC0415  (a second to load)

    api = HfApi(endpoint=endpoint, token=False)  # The datasets are public: no mirror needs to see a token.
    try:
        tree = list(api.list_repo_tree(repo, repo_type="dataset", recursive=True))
    except Exception as error:  # What the client raises has changed with the HTTP library below it.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"cannot list {api.endpoint}/datasets/{repo}: {reason}; --endpoint names a mirror") from None
    url = partial(hf_hub_url, repo, repo_type="dataset", endpoint=endpoint)
    return [
        RemoteFile(file.path, url(file.path), file.size, f"sha256:{file.lfs.sha256}")
        for file in tree
        if isinstance(file, RepoFile) and file.lfs
    ]


def _fetch_all(files: Sequence[RemoteFile], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(max(file.size - _size(Path(f"{folder / file.name}.partial")), 0) for file in files)
    if needed > (free := shutil.disk_usage(folder).free):
        raise InputError(f"{folder}: needs {needed:,} bytes, {free:,} are free; name an --out with more room")
    stop, lock = threading.Event(), threading.Lock()
    with progress("download", total=needed, unit="B") as advance, ThreadPoolExecutor(CONNECTIONS) as pool:

        def count(amount: int, note: str = "") -> None:
            with lock:
                advance(amount, note)

        try:
            for fetched in as_completed([pool.submit(_fetch, file, folder, count, stop) for file in files]):
                fetched.result()
        except BaseException:  # Ctrl-C too
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(file: RemoteFile, folder: Path, count: Callable[..., None], stop: threading.Event) -> None:
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    part, failures = Path(f"{path}.partial"), 0
    while (before := _size(part)) != file.size:
        try:
            _continue(file, part, count, stop)
        except requests.RequestException as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > RETRIES:
                reason = type(error).__name__ if error.response is None else error.response.reason
                came = f"after {_size(part):,} of {file.size:,} bytes ({reason})"
                raise InputError(f"{file.url}: broke off {came}; the same command continues") from None
            if stop.wait(FIRST_WAIT_S * 2 ** (failures - 1)):
                raise CancelledError from None
    _finish(file, part, path)


def _continue(file: RemoteFile, part: Path, count: Callable[..., None], stop: threading.Event) -> None:
    """Ask once, for the rest of a partial file; all of it comes where the remote file is not the same any more."""
    validator, have = Path(f"{part}.validator"), _size(part)
    headers = {"Accept-Encoding": "identity"}
    if _size(validator) and have < file.size:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator.read_text()}
    with requests.get(file.url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if 400 <= response.status_code < 500 and response.status_code != requests.codes.too_many_requests:
            raise InputError(f"{file.url}: {response.status_code} {response.reason}; --endpoint names a mirror")
        response.raise_for_status()
        start = have if response.status_code == requests.codes.partial_content else 0
        length = response.headers.get("Content-Length")
        if length and start + int(length) != file.size:
            raise InputError(f"{file.url}: {start + int(length):,} bytes, the published file has {file.size:,}")
        with part.open("ab" if start else "wb") as sink:
            if not start:
                count(-have)
                etag = response.headers.get("ETag", "W/")  # A weak one does not promise the same bytes.
                validator.write_text(response.headers.get("Last-Modified", "") if etag.startswith("W/") else etag)
            for block in response.iter_content(1 << 20):
                if stop.is_set():
                    raise CancelledError
                sink.write(block)
                count(len(block), file.name)
    if _size(part) != file.size:
        raise requests.ConnectionError


def _finish(file: RemoteFile, part: Path, path: Path) -> None:
    """Give a file that has all its bytes its name, if they are the right ones."""
    Path(f"{part}.validator").unlink(missing_ok=True)
    if not _is_right(file, part):
        part.unlink()
        raise InputError(f"{file.url}: what came is not {file.checksum}; the same command fetches it anew")
    if not file.checksum.startswith("sha256:"):
        write_whole(Path(f"{path}.sha256"), f"{_hash(part, 'sha256')}  {path.name}\n")
    part.replace(path)


def _is_right(file: RemoteFile, path: Path) -> bool:
    algorithm, expected = file.checksum.split(":")
    return _hash(path, algorithm) == expected


def _hash(path: Path, algorithm: str) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, algorithm).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
