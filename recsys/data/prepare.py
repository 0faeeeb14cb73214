"""Prepare: raw click logs to Parquet and schema.json, in bounded memory, restartable at any point.

Stages: ingest (by file), vocabulary (by column: counted, or another folder's; not where ids are raw), encode (by part),
verify. Each job of a stage leaves its results under their final names only when they are whole, and beside them a small
file of facts; a job whose facts are there is done.
So the same command, run again after whatever ended it, goes on where it was, and ends with the same bytes. All of it
happens in a folder beside `out` that takes its name only at the end: a prepared folder is always a whole one.
"""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.config import InputError, write_whole
from recsys.data.encode import EncodeJob, encode, file_facts
from recsys.data.engine import Kernel, run
from recsys.data.ingest import MAX_EXAMPLES, IngestJob, PartOfLog, fingerprint, ingest, part_path, too_many
from recsys.data.known import KnownJob, take_vocabulary
from recsys.data.manifest import MANIFEST, TIMINGS
from recsys.data.raw import check_readable
from recsys.data.remap import ColumnJob
from recsys.data.schema import RAW, SPLITS, Schema
from recsys.data.settings import BASE_BYTES, INGEST_BYTES, PrepareConfig
from recsys.data.split import intervals
from recsys.data.verify import verify
from recsys.data.vocabulary import VocabularyJob, make_vocabulary
from recsys.data.working_folder import remove, remove_if_done, working_in
from recsys.place import is_local
from recsys.progress import progress

# A loader holds a few row groups open at once and copies whole ones: 64k rows fit its cache, and small data still gets
# enough groups to shuffle.
MIN_GROUP_ROWS, MAX_GROUP_ROWS, TARGET_GROUPS = 1024, 65_536, 64

# More threads than that wait for the one that unpacks the file (0.45 of 2.9 CPU-seconds a million rows).
INGEST_THREADS = 6
# Resident memory of a job.
VOCABULARY_BYTES = 150 << 20
ENCODE_BYTES = 200 << 20


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Prepare a raw log and return its manifest.

    Raises:
        InputError: `out` exists or cannot be made, a file cannot be read or changes, more rows are malformed than
            `max_malformed`, the disk is full, or the folder holds an unfinished preparation with other settings.
    """
    # On an object store the manifest comes last; without it, an interrupted copy may go on.
    folder = (config.work or config.out.parent) / f".{config.out.name}.partial"
    if (config.out if is_local(config.out) else config.out / MANIFEST).exists():
        remove_if_done(folder)
        raise InputError(f"{config.out}: exists already; name another --out, or delete it first")
    for path in config.files:
        check_readable(path)  # a wrong name of the last file is told now, not after hours
    with working_in(folder, config):
        return Preparation(config, folder).run()


class Preparation:
    """One preparation: its stages in order, over a working folder."""

    def __init__(self, config: PrepareConfig, folder: Path, *, show_progress: bool = True) -> None:
        self.show_progress = show_progress
        self.config, self.folder = config, folder.absolute()  # Ray's workers run elsewhere
        self.work, self.data = self.folder / "work", self.folder / "data"
        self.raw = config.raw
        self.rules = config.rules(self.raw)
        self.cores = len(os.sched_getaffinity(0))
        self.ingest_threads = min(self.cores, INGEST_THREADS)
        self.timings: dict[str, dict[str, float]] = self._facts(self.work / TIMINGS) or {}  # earlier attempts count

    def run(self) -> dict[str, Any]:
        """Run what is not done yet, and give the folder its name."""
        files = self._ingest()
        parts = self._parts(files)
        schema = self._schema(parts)
        self._encode(parts, schema)
        self.manifest = self._manifest(files, schema)
        self._verify()
        write_whole(self.data / TIMINGS, json.dumps(self.timings, indent=2) + "\n")
        self.work_bytes = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        self._finish()
        return self.manifest

    # ---- stages

    def _ingest(self) -> list[dict[str, Any]]:
        """Parse every raw file into typed parts; returns the facts of the files."""
        folder = self._stage_folder("ingest")
        jobs = [
            IngestJob(rules=self.rules, path=_absolute(path), file=i, folder=folder, threads=self.ingest_threads)
            for i, path in enumerate(self.config.files)
        ]
        done = [self._facts(folder / f"{job.file:04d}.json") for job in jobs]
        for job, facts in zip(jobs, done, strict=True):
            if facts and facts["fingerprint"] != fingerprint(job.path):
                raise InputError(
                    f"{job.path}: the file changed since it was ingested; restore it, or delete "
                    f"{self.folder} to begin anew"
                )
        num_rows = 0
        total = sum(fingerprint(path)[0] for path in self.config.files)
        with self._stage("ingest", total=total / 1e6, unit="MB") as advance:

            def advanced(num_bytes: int, rows: int) -> None:
                nonlocal num_rows
                num_rows += rows
                advance(num_bytes / 1e6, f"{num_rows:,} rows")

            for facts in filter(None, done):
                advanced(facts["fingerprint"][0], sum(part["num_rows"] for part in facts["parts"]))
            files = self._run(ingest, jobs, done, advanced, memory=INGEST_BYTES, cpus=self.ingest_threads)
        pa.default_memory_pool().release_unused()  # of the system's allocator, whoever allocated: up to 150 MiB
        malformed = [told for file in files for part in file["parts"] for told in part["malformed"]]
        num_malformed = sum(part["num_malformed"] for file in files for part in file["parts"])
        if num_malformed > self.config.max_malformed:
            raise InputError(too_many(self.config.max_malformed, malformed, num_malformed))
        if not sum(part["num_rows"] for file in files for part in file["parts"]):
            raise InputError(f"{self.config.files[0]}: no well-formed row in it")
        return files

    def _parts(self, files: Sequence[dict[str, Any]]) -> list[PartOfLog]:
        """All parts that hold rows, in order of the log, with the intervals of their rows that train."""
        found = [
            (part_path(self.work / "ingest", i, j), facts)
            for i, file in enumerate(files)
            for j, facts in enumerate(file["parts"])
            if facts["num_rows"]
        ]
        bounds = self._bounds(files, [facts["num_rows"] for _, facts in found])
        return [
            PartOfLog(path=path, num_rows=facts["num_rows"], bounds=bound, num_values=facts["num_values"])
            for (path, facts), bound in zip(found, bounds, strict=True)
        ]

    def _bounds(self, files: Sequence[dict[str, Any]], rows: list[int]) -> list[tuple[int, int] | None]:
        """Of each part the rows at which validation and test begin, if the split is an interval of the log."""
        if self.rules.splits_early:
            return [None] * len(rows)
        days: Counter[str] = Counter()
        for day, file in zip(self.config.days, files, strict=True):
            days[day] += sum(p["num_rows"] for p in file["parts"])
        valid, test = intervals(self.rules.split, list(days.values()))
        starts = [0, *accumulate(rows)]
        return [
            (min(max(valid - start, 0), size), min(max(test - start, 0), size))
            for start, size in zip(starts, rows, strict=False)
        ]

    def _schema(self, parts: list[PartOfLog]) -> Schema:
        """Write the schema, for which every category's values need ids, unless they are ids themselves."""
        is_raw = self.config.vocabulary == "raw"
        sparse = dict.fromkeys(self.rules.keys, RAW) if is_raw else self._vocabulary(parts)
        known = self.config.known
        schema = (
            known.schema
            if known
            else Schema(
                name=self.raw.name,
                dense=self.rules.dense,
                sparse=sparse,
                labels=(self.raw.label,),
                weight=self.rules.weight,
            )
        )
        schema.save(self.data)
        return schema

    def _vocabulary(self, parts: list[PartOfLog]) -> dict[str, int]:
        """Give ids to the values of every category; returns how many each has, 0 included."""
        folder, out = self._stage_folder("vocabulary"), self.data / "vocabulary"
        out.mkdir(exist_ok=True)
        memory = (self.config.memory_bytes - BASE_BYTES) // self._workers(VOCABULARY_BYTES)
        jobs, kernel = self._vocabulary_jobs({"parts": tuple(parts), "folder": folder, "out": out, "memory": memory})
        done = [self._facts(folder / f"{job.feature}.json") for job in jobs]
        with self._stage("vocabulary", total=len(jobs) * len(parts), unit="parts of columns") as advance:
            advance(len(parts) * sum(facts is not None for facts in done))
            facts = self._run(kernel, jobs, done, advance, memory=VOCABULARY_BYTES)
        return {each["feature"]: each["num_ids"] for each in facts}

    def _vocabulary_jobs(self, common: dict[str, Any]) -> tuple[Sequence[ColumnJob], Kernel]:
        """A job a category, with what all have in common, and what does them: values are counted, or known."""
        if known := self.config.known:
            folder = _absolute(known.folder) / "vocabulary"
            return [
                KnownJob(feature=feature, known=folder / f"{feature}.parquet", sha256=facts.sha256, **common)
                for feature, facts in known.files.items()
            ], take_vocabulary
        caps, threshold = self.config.caps(self.raw), self.config.threshold or self.raw.threshold
        is_hashed = self.config.vocabulary == "hash"
        return [
            VocabularyJob(
                feature=feature,
                weight=self.rules.weight,
                threshold=threshold,
                max_ids=caps[feature],
                hashed=is_hashed,
                **common,
            )
            for feature in self.rules.keys
        ], make_vocabulary

    def _encode(self, parts: list[PartOfLog], schema: Schema) -> None:
        """Write every part's rows by split."""
        folder = self._stage_folder("encode")
        for name in SPLITS:
            (self.data / name).mkdir(exist_ok=True)
        num_rows = sum(part.num_rows for part in parts)
        group_rows = min(max(num_rows // TARGET_GROUPS, MIN_GROUP_ROWS), MAX_GROUP_ROWS)
        starts = {name: 0 for name in schema.sparse if name not in schema.raw}
        jobs = []
        for i, part in enumerate(parts):
            remaps = {}
            for name, start in starts.items():
                remaps[name] = (self.work / "vocabulary" / f"{name}.remap", start, part.num_values[name])
                starts[name] += part.num_values[name]
            jobs.append(
                EncodeJob(
                    part=part,
                    index=i,
                    schema=schema,
                    remaps=remaps,
                    group_rows=group_rows,
                    folder=folder,
                    out=self.data,
                )
            )
        done = [self._facts(folder / f"{job.index:05d}.json") for job in jobs]
        with self._stage("encode", total=num_rows, unit="rows") as advance:
            advance(sum(job.part.num_rows for job, facts in zip(jobs, done, strict=True) if facts))
            self.files = {
                name: facts
                for each in self._run(encode, jobs, done, advance, memory=ENCODE_BYTES)
                for name, facts in each.items()
            }

    def _manifest(self, files: Sequence[dict[str, Any]], schema: Schema) -> dict[str, Any]:
        """Write the manifest: it depends on the raw rows and the settings alone."""
        parts = [part for file in files for part in file["parts"]]
        splits = {}
        for name in SPLITS:
            own = [facts for file, facts in self.files.items() if file.startswith(f"{name}/")]
            num_rows = sum(facts["num_rows"] for facts in own)
            splits[name] = {
                "num_rows": num_rows,
                "label_mean": sum(facts["label_sum"] for facts in own) / max(num_rows, 1),
            }
        num_raw_rows = sum(part["num_raw_rows"] for part in parts)
        nulls: Counter[str] = sum((Counter(part["nulls"]) for part in parts), Counter())
        described = {"schema.json": file_facts(self.data / "schema.json")}
        for feature in schema.sparse if self.config.vocabulary == "count" else ():
            path = self.data / "vocabulary" / f"{feature}.parquet"
            described[f"vocabulary/{path.name}"] = {"num_rows": pq.read_metadata(path).num_rows} | file_facts(path)
        manifest = {
            "schema_hash": schema.hash,
            "config": self.config.determining,
            "num_rows": sum(part["num_rows"] for part in parts),
            "splits": splits,
            "null_share": {c.name: nulls[c.name] / num_raw_rows for c in self.raw.columns if c.kind != "unused"},
            "num_malformed": sum(part["num_malformed"] for part in parts),
            "malformed": [told for part in parts for told in part["malformed"]][:MAX_EXAMPLES],
            "files": self.files | described,
        }
        write_whole(self.data / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        return manifest

    def _verify(self) -> None:
        for path in self.data.rglob(".*.partial"):  # of jobs that were killed and done again
            path.unlink()
        with self._timed("verify"):
            problems = verify(self.data, decode=False, show_progress=False)
        assert not problems, f"{self.folder}: {problems[0]}"

    def _finish(self) -> None:
        """Give the data their name, copied first where that is on another disk or an object store."""
        out = self.config.out
        if is_local(out) and self.config.work is None:
            self.data.rename(out)
        elif is_local(out):
            copied = out.with_name(f".{out.name}.copied")
            self._copy(copied)
            copied.rename(out)
        else:
            self._copy(out)
        remove(self.folder)

    def _copy(self, out: Path) -> None:
        """Copy the data, the manifest last; what an interrupted copy brought over is not copied again."""
        files = self.manifest["files"]
        with self._stage("copy", total=sum(facts["bytes"] for facts in files.values()) / 1e6, unit="MB") as advance:
            for name in (*files, TIMINGS, MANIFEST):
                source, target = self.data / name, out / name
                size = source.stat().st_size
                if name not in files or not _is_copied(target, files[name]):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with source.open("rb") as read, target.open("wb") as written:
                        shutil.copyfileobj(read, written, 1 << 20)
                advance(size / 1e6, name)

    # ---- what stages share

    def _stage_folder(self, name: str) -> Path:
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        return folder

    @staticmethod
    def _facts(path: Path) -> dict[str, Any] | None:
        """What a job left when it was done; None if it was not."""
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return facts

    def _workers(self, memory: int, cpus: int = 1) -> int:
        """Jobs at a time that the memory and the cores allow."""
        return max(min((self.config.memory_bytes - BASE_BYTES) // memory, self.cores // cpus), 1)

    def _run(
        self,
        kernel: Kernel,
        jobs: Sequence[Any],
        done: Sequence[dict[str, Any] | None],
        advance: Callable[..., None],
        *,
        memory: int,
        cpus: int = 1,
    ) -> list[dict[str, Any]]:
        """Run the jobs that have no facts yet; returns the facts of all."""
        left = [i for i, facts in enumerate(done) if facts is None]
        found = run(
            self.config.engine,
            kernel,
            [jobs[i] for i in left],
            advance,
            workers=self._workers(memory, cpus),
            cpus=cpus,
            memory=BASE_BYTES + memory,
        )
        facts = dict(zip(left, found, strict=True))
        return [each if each is not None else facts[i] for i, each in enumerate(done)]

    @contextmanager
    def _stage(self, name: str, *, total: float, unit: str) -> Iterator[Callable[..., None]]:
        with self._timed(name), progress(name, total=total, unit=unit, show=self.show_progress) as advance:
            yield advance

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        before = self.timings.get(name, {"seconds": 0.0, "cpu_seconds": 0.0})
        self.timings[name] = {
            "seconds": before["seconds"] + time.perf_counter() - wall,
            "cpu_seconds": before["cpu_seconds"] + time.process_time() - cpu,
        }
        write_whole(self.work / TIMINGS, json.dumps(self.timings))


def _absolute(path: Path) -> Path:
    return path.absolute() if is_local(path) else path


def _is_copied(target: Path, facts: dict[str, Any]) -> bool:
    if not target.exists() or target.stat().st_size != facts["bytes"]:
        return False
    return bool(file_facts(target)["sha256"] == facts["sha256"])
