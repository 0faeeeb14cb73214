"""What preparing a click log costs: CPU, wall time and memory, beside what merely reading the log costs.

Makes a log in Criteo's format, runs `recsys prepare` over it, and in the same run reads the same text with
`pyarrow.csv` and the same files with isal, so that the ratios hold on a machine whose cores are shared.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import tyro
from isal import igzip
from numpy.typing import NDArray
from pyarrow import csv

from facts import REPOSITORY, facts, output

Words = NDArray[np.uint32]

SEED, CTR, ZIPF_EXPONENT, CHUNK_ROWS = 7, 0.25, 1.05, 2**15
INTEGERS, MISSING_INTEGERS = 13, 0.2
"""Every third column has missing ones."""
DOMAINS, MISSING_CATEGORIES = [round(4 * 5_000_000 ** (field / 25)) for field in range(26)], 0.1
"""Each category's number of values; every fifth has missing ones. Over all categories, 4 million rows hold 4.7 million
values."""

POLL_S = 0.02
READ_BYTES = 2**20
GZ_ROW_BYTES, TEXT_ROW_BYTES, PREPARED_ROW_BYTES = 119, 270, 200
"""To estimate the disk space; the last is generous, for typed parts and output at once."""
FULL_LOG_ROWS = 4_370_000_000
"""Rows of the Criteo terabyte log."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure `recsys prepare` on a made-up log."""

    rows: int
    """Rows of the log, over all files."""
    json: Path
    """File for the result."""
    memory: str = "1GiB"
    """Passed on to prepare, where it has that option."""
    threshold: int = 10
    """Passed on to prepare."""
    work: Path | None = None
    """Folder for the log and what is prepared; a temporary one when not given."""
    files: int | None = None
    """Files of the log; one per million rows when not given."""
    keep: bool = False
    """Keep the log and what was prepared; the next run in the same --work takes that log again."""

    def __post_init__(self) -> None:
        if self.rows < 1 or (self.files is not None and not 1 <= self.files <= self.rows):
            raise ValueError(f"--rows {self.rows} and --files {self.files}: at least one file, and one row in each")


def main(config: Config) -> dict[str, Any]:
    """Make the log, prepare it, read it, and return what was measured."""
    load = os.getloadavg()
    work = (config.work or Path(tempfile.mkdtemp(prefix="benchmark-prepare-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    log, prepared, plain = (work / name for name in ("log", "prepared", "plain.tsv"))
    shutil.rmtree(prepared, ignore_errors=True)
    try:
        raw_bytes = make_log(log, config.rows, config.files or -(-config.rows // 1_000_000))
        paths = sorted(log.glob("*.gz"))
        options = ["--out", str(prepared), "--threshold", str(config.threshold)]
        takes_memory = "--memory" in output(sys.executable, "-m", "recsys", "prepare", "--help")
        options += ["--memory", config.memory] if takes_memory else []
        cost = run_measured([sys.executable, "-m", "recsys", "prepare", "criteo_kaggle", *map(str, paths), *options])
        with _processes(1) as pool:
            csv_s, stream_s = (
                sum(pool.map(read_csv, paths, [plain] * len(paths), [w] * len(paths))) for w in (True, False)
            )
            gunzip_s, read_s = (sum(pool.map(read_bytes, paths, [unpack] * len(paths))) for unpack in (True, False))
        manifest, schema = (json.loads((prepared / f"{name}.json").read_text()) for name in ("manifest", "schema"))
        assert manifest["num_rows"] == config.rows, f"prepared {manifest['num_rows']} rows of {config.rows}"
        stages = prepared / "timings.json"
        return {
            "rows": config.rows,
            "files": len(paths),
            "raw_bytes": raw_bytes,
            "gz_bytes": sum(path.stat().st_size for path in paths),
            "distinct": sum(schema["sparse"].values()) - len(schema["sparse"]),
            "distinct_note": f"values seen at least {config.threshold} times in training rows, over all categories",
            **cost,
            "rows_per_cpu_second": config.rows / cost["cpu_seconds"],
            "output_bytes": sum(path.stat().st_size for path in prepared.rglob("*") if path.is_file()),
            "pyarrow_read_cpu_seconds": csv_s,
            "ratio_to_pyarrow_read": cost["cpu_seconds"] / csv_s,
            "pyarrow_stream_cpu_seconds": stream_s,
            "ratio_to_pyarrow_stream": cost["cpu_seconds"] / stream_s,
            "gunzip_cpu_seconds": gunzip_s,
            "byte_read_cpu_seconds": read_s,
            "core_hours_for_4_37_billion_rows": cost["cpu_seconds"] / config.rows * FULL_LOG_ROWS / 3600,
            "stages": json.loads(stages.read_text()) if stages.exists() else None,
            "memory": config.memory if takes_memory else None,
            "threshold": config.threshold,
            **facts(__file__, ("polars", "pyarrow", "numpy", "isal"), load),
        }
    finally:
        plain.unlink(missing_ok=True)
        if config.keep:
            print(f"kept {work}")
        else:
            shutil.rmtree(log, ignore_errors=True)
            shutil.rmtree(prepared, ignore_errors=True)
            if not config.work:
                work.rmdir()


def make_log(folder: Path, rows: int, files: int) -> int:
    """Write the log's files, or take those of an earlier run; returns the bytes of their text."""
    made, recipe = folder / "made.json", {"rows": rows, "files": files, "seed": SEED}
    if made.exists() and (found := json.loads(made.read_text())).items() >= recipe.items():
        print(f"took the log of an earlier run, {folder}")
        return int(found["raw_bytes"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    free = shutil.disk_usage(folder).free
    needed = rows * (GZ_ROW_BYTES + PREPARED_ROW_BYTES) + -(-rows // files) * TEXT_ROW_BYTES
    print(f"disk: about {needed / 1e9:.2f} GB needed in {folder.parent}, {free / 1e9:.2f} GB free", flush=True)
    if needed > free:
        raise SystemExit(f"{folder.parent}: the disk is too small; name another --work")
    counts = [rows // files + (file < rows % files) for file in range(files)]
    paths = [folder / f"day_{file:05d}.gz" for file in range(files)]
    with _processes(min(files, os.cpu_count() or 1)) as pool:
        raw_bytes = sum(pool.map(write_file, range(files), counts, paths))
    made.write_text(json.dumps({**recipe, "raw_bytes": raw_bytes}) + "\n")
    return raw_bytes


def write_file(file: int, num_rows: int, path: Path) -> int:
    """Write one gzip file of the log; the same number and rows give the same bytes. Returns the bytes of its text."""
    size = 0
    with igzip.IGzipFile(str(path), "wb", compresslevel=1, mtime=0) as packed:
        for chunk, first in enumerate(range(0, num_rows, CHUNK_ROWS)):
            text = chunk_text(file, chunk, min(CHUNK_ROWS, num_rows - first))
            size += len(text)
            packed.write(text)
    return size


def chunk_text(file: int, chunk: int, num_rows: int) -> bytes:
    """Rows of the log as text.

    Each value is written into a slot of two words, padded with NULs; without the NULs, the slots are the text. That is
    four times as fast as formatting it.
    """
    rng = np.random.default_rng([SEED, file, chunk])
    column = np.dtype([("tab", "u1"), ("slot", "u4", 2)])
    cells = np.zeros(num_rows, [("label", "u1"), ("columns", column, INTEGERS + len(DOMAINS)), ("end", "u1")])
    cells["label"] = ord("0") + (rng.random(num_rows) < CTR)
    cells["columns"]["tab"] = ord("\t")
    cells["end"] = ord("\n")
    slots = cells["columns"]["slot"]
    for i in range(INTEGERS):
        values = np.exp(1.5 * rng.standard_normal(num_rows) + 1 + 0.4 * i).astype(np.int64) - 1
        high = values.clip(0) // 10_000
        present = rng.random(num_rows) >= (MISSING_INTEGERS if i % 3 == 0 else 0)
        slots[:, i, 0] = STRIPPED[high] * (present & (high > 0))
        slots[:, i, 1] = np.where(high > 0, PADDED[values % 10_000], STRIPPED[values.clip(max=9_999)]) * present
    for f, domain in enumerate(DOMAINS):
        # The power law x^-ZIPF_EXPONENT on [1, domain + 1), rounded down.
        last = (domain + 1) ** (1 - ZIPF_EXPONENT)
        rank = (1 - rng.random(num_rows) * (1 - last)) ** (1 / (1 - ZIPF_EXPONENT))
        words = _scrambled(rank.clip(max=domain).astype(np.uint32) | np.uint32(f << 23))
        present = rng.random(num_rows) >= (MISSING_CATEGORIES if f % 5 == 4 else 0)
        slots[:, INTEGERS + f, 0] = HEX[words >> 16] * present
        slots[:, INTEGERS + f, 1] = HEX[words & 0xFFFF] * present
    return cells.tobytes().translate(None, b"\0")


def _words(texts: list[str]) -> Words:
    """Texts of four characters, each as one word."""
    return np.frombuffer("".join(texts).encode(), np.uint32)


STRIPPED = _words([f"{n:\0>4}" for n in (*range(10_000), -1)])  # -1 at index -1
PADDED = _words([f"{n:04d}" for n in range(10_000)])
HEX = _words([f"{n:04x}" for n in range(2**16)])


def _scrambled(x: Words) -> Words:
    """A bijection of 32-bit numbers (the last step of MurmurHash3): distinct ids stay distinct."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a command from the repository; returns its cost, that of its descendants included.

    `peak_rss_bytes` sums all processes every 20 ms: pages that they share count more than once, and a shorter peak may
    be missed. `max_rss_child_bytes` is the exact peak of the largest one alone.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=REPOSITORY)
    peak, done = [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(process.pid, peak, done), daemon=True)
    watch.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    done.set()
    watch.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": wall_s,
        "peak_rss_bytes": peak[0],
        "max_rss_child_bytes": usage.ru_maxrss * 1024,
    }


def _watch(pid: int, peak: list[int], done: threading.Event) -> None:
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        while not done.wait(POLL_S):
            resident = 0
            for process in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    resident += process.memory_info().rss
            peak[0] = max(peak[0], resident)


def read_bytes(path: Path, unpack: bool) -> float:
    """CPU-seconds of reading a file's bytes, of unpacking them too if asked for."""
    with igzip.open(path, "rb") if unpack else path.open("rb", buffering=0) as file:
        started = time.process_time()
        while file.read(READ_BYTES):
            pass
        return time.process_time() - started


def read_csv(path: Path, plain: Path, whole: bool) -> float:
    """CPU-seconds of reading a file's text into typed columns, as one table or block by block, from memory's cache."""
    with igzip.open(path, "rb") as packed, plain.open("wb") as text:
        shutil.copyfileobj(packed, text, READ_BYTES)
    types = {name: pa.int64() for name in ("label", *(f"I{i}" for i in range(INTEGERS)))}
    types |= {f"C{f}": pa.string() for f in range(len(DOMAINS))}
    read_options = csv.ReadOptions(column_names=list(types))
    parse_options = csv.ParseOptions(delimiter="\t")
    started = time.process_time()
    convert_options = csv.ConvertOptions(column_types=types)
    if whole:
        csv.read_csv(plain, read_options, parse_options, convert_options)
    else:
        with csv.open_csv(plain, read_options, parse_options, convert_options) as blocks:
            for _ in blocks:
                pass
    return time.process_time() - started


def _processes(count: int) -> ProcessPoolExecutor:
    """Other processes, for what needs memory: Linux counts this one's peak as that of a command started from here."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))


def _table(result: dict[str, Any]) -> str:
    lines = []
    for name, value in result.items():
        if isinstance(value, int | float):
            shown = f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else f"{value:,.10g}"
            lines.append(f"{name:<34}{shown:>16}")
    return "\n".join(lines)


if __name__ == "__main__":
    config = tyro.cli(Config)
    result = main(config)
    config.json.write_text(json.dumps(result, indent=2) + "\n")
    print(_table(result))
