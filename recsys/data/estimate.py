"""Estimate: what preparing a log will take, from its first rows."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from recsys.config import InputError
from recsys.data.formats import RawFormat
from recsys.data.prepare import Preparation
from recsys.data.raw import GZIP_MAGIC, check_readable, count
from recsys.data.settings import PrepareConfig
from recsys.data.working_folder import working_in

SAMPLE_BYTES = 48 << 20
"""Of the first file, as it lies on disk; some 400,000 rows of a packed Criteo log."""
MAX_SAMPLE_TEXT = 256 << 20
SAMPLE_PARQUET_ROWS = 100_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Figures for the whole log, in proportion to a sample."""

    sample_rows: int
    num_rows: float
    raw_bytes: int
    work_bytes: float
    """Of the working folder, which goes at the end."""
    data_bytes: float
    """Of the prepared data. Later values are rarer, so their ids take somewhat more than the sample's."""
    free_bytes: int
    """On the disk of the working folder."""
    memory_bytes: int
    """The bound that is kept."""
    cpu_seconds: float
    wall_seconds: float
    """On this machine."""

    def lines(self) -> list[str]:
        """The figures for people."""
        disk = self.work_bytes + self.data_bytes
        fits = "fits" if disk < self.free_bytes else "DOES NOT FIT"
        return [
            f"from the first {self.sample_rows:,} rows:",
            f"rows    {self.num_rows:,.0f} in {self.raw_bytes / 1e9:,.2f} GB of raw files",
            f"disk    {disk / 1e9:,.2f} GB at most, {self.data_bytes / 1e9:,.2f} GB of it stay; "
            f"{self.free_bytes / 1e9:,.2f} GB are free: {fits}",
            f"memory  {self.memory_bytes / 2**30:,.2f} GiB at most (--memory)",
            f"time    {self.wall_seconds / 60:,.1f} minutes here, {self.cpu_seconds / 3600:,.2f} core-hours",
        ]


def estimate(config: PrepareConfig) -> Estimate:
    """Prepare the first rows of a log in a temporary folder, and scale what that took.

    Raises:
        InputError: a file cannot be read, or the sample cannot be prepared.
    """
    for path in config.files:
        check_readable(path)
    raw = config.raw
    raw_bytes = sum(path.stat().st_size for path in config.files)
    place = config.work or config.out.parent
    with TemporaryDirectory(prefix="recsys-sample-") as folder:
        sample = Path(folder) / "sample"
        share = _write_sample(raw, config.files[0], sample) / raw_bytes
        own = replace(
            config, paths=(sample,), out=Path(folder) / "out", work=None, engine="local", split="random", dry_run=False
        )
        wall, cpu = time.perf_counter(), time.process_time()
        with working_in(Path(folder) / "work", own):
            preparation = Preparation(own, Path(folder) / "work", show_progress=False)
            preparation.run()
            manifest = preparation.manifest
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        data_bytes = _size(own.out.rglob("*"))
    # A known vocabulary is as large for the sample as for the log.
    known_bytes = sum(facts.bytes for facts in config.known.files.values()) if config.known else 0
    took = preparation.timings["vocabulary"] if config.known else {"seconds": 0.0, "cpu_seconds": 0.0}
    return Estimate(
        sample_rows=manifest["num_rows"],
        num_rows=manifest["num_rows"] / share,
        raw_bytes=raw_bytes,
        work_bytes=preparation.work_bytes / share,
        data_bytes=(data_bytes - known_bytes) / share + known_bytes,
        free_bytes=shutil.disk_usage(_existing(place)).free,
        memory_bytes=config.memory_bytes,
        cpu_seconds=(cpu - took["cpu_seconds"]) / share + took["cpu_seconds"],
        wall_seconds=(wall - took["seconds"]) / share + took["seconds"],
    )


def _write_sample(raw: RawFormat, path: Path, sample: Path) -> float:
    """Write the first rows of a file to `sample`, unpacked; returns how many bytes of the file they take."""
    if raw.file == "parquet":
        with path.open("rb") as file:
            source = pq.ParquetFile(file)
            rows = next(source.iter_batches(SAMPLE_PARQUET_ROWS), None)
            if rows is None:
                raise InputError(f"{path}: no row in it")
            with pq.ParquetWriter(sample, rows.schema) as writer:
                writer.write_batch(rows)
            return path.stat().st_size * rows.num_rows / source.metadata.num_rows
    with path.open("rb") as file:
        packed = file.read(SAMPLE_BYTES)
    text, taken = packed, len(packed)
    if packed.startswith(GZIP_MAGIC):
        from isal import isal_zlib  # noqa: PLC0415  (plain text does not need it)

        text, left = b"", packed
        try:
            while left and len(text) < MAX_SAMPLE_TEXT:
                unpacker = isal_zlib.decompressobj(31)
                text += unpacker.decompress(left, MAX_SAMPLE_TEXT - len(text))
                left = unpacker.unused_data or unpacker.unconsumed_tail
                if unpacker.unconsumed_tail:
                    break
        except isal_zlib.error as error:  # type: ignore[misc]  # its stub gives an instance
            raise InputError(f"{path}: the gzip stream is corrupt ({error})") from None
        taken -= len(left)
    end = text.rfind(b"\n") + 1 or len(text)
    if not count(text[:end], "\n") > raw.header:
        raise InputError(f"{path}: no whole row in its first {len(packed):,} bytes")
    sample.write_bytes(text[:end])
    return taken * end / len(text)


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
