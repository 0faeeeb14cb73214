"""Known vocabularies: those of a folder that is prepared already, so that another log has the same ids.

What a model was trained on is then what it predicts. Values that the folder does not know, or left out as rare, have
id 0, and nothing is counted.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from recsys.config import InputError, load, write_whole
from recsys.data.encode import file_facts
from recsys.data.formats import RawFormat
from recsys.data.manifest import MANIFEST, FileFacts, Manifest
from recsys.data.remap import ColumnJob, write_remap
from recsys.data.schema import Schema
from recsys.place import whole


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a folder was prepared with, as far as its features depend on it."""

    raw_format: RawFormat
    vocabulary: str
    integers: str
    impressions: str
    threshold: int
    max_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Known:
    """A prepared folder whose ids another log is to have."""

    folder: Path
    schema: Schema
    settings: Settings
    files: dict[str, FileFacts]
    """Of each feature: its vocabulary, which holds (key, id, count)."""

    @classmethod
    def load(cls, folder: Path, raw: RawFormat) -> "Known":
        """Read what a prepared folder knows.

        Args:
            folder: prepared folder, of this machine or of an object store.
            raw: format of the other log.

        Raises:
            InputError: it is not a prepared folder, of another format, or its ids were not counted.
        """
        schema, manifest = Schema.load(folder), Manifest.load(folder)
        settings = _settings(folder)
        if settings.vocabulary != "count":
            again = (
                f"--vocabulary {settings.vocabulary}{' with its --max-ids' if settings.vocabulary == 'hash' else ''}"
            )
            raise InputError(
                f"--like {folder}: it has no vocabulary, for its ids are those of --vocabulary {settings.vocabulary}; "
                f"leave out --like: {again} --split test gives any log the same ids"
            )
        _check_format(folder, settings.raw_format, raw)
        if schema.hotness:
            raise InputError(
                f"--like {folder}: its features are multi-hot; name the folder that `recsys multihot` copied, and run "
                f"that on the new one too"
            )
        listed = {feature: manifest.files.get(f"vocabulary/{feature}.parquet") for feature in schema.sparse}
        files = {feature: facts for feature, facts in listed.items() if facts}
        fits = [(files[name].num_rows or 0) + 1 == num_ids for name, num_ids in schema.sparse.items() if name in files]
        if manifest.schema_hash != schema.hash or len(files) < len(schema.sparse) or not all(fits):
            raise InputError(
                f"--like {folder}: its schema is not that of its manifest; `recsys data verify {folder}` tells more"
            )
        return cls(folder=folder, schema=schema, settings=settings, files=files)

    @property
    def hash(self) -> str:
        """Twelve hex digits that change whenever an id does."""
        listed = [self.schema.hash, *(facts.sha256 for facts in self.files.values())]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]


def _settings(folder: Path) -> Settings:
    path = folder / MANIFEST
    given = json.loads(path.read_text()).get("config")
    if not isinstance(given, dict):
        raise InputError(f"{path}: it does not say how the folder was prepared; prepare that again")
    names = Settings.__dataclass_fields__
    return load(Settings, {name: given[name] for name in names if name in given}, f"{path}, config")


def _check_format(folder: Path, known: RawFormat, raw: RawFormat) -> None:
    """Compare formats by name and by columns; their order, and how a file is written, may differ."""
    if known.name != raw.name:
        raise InputError(f"--like {folder}: it was prepared from format {known.name}, not {raw.name}")
    mine, given = ({c.name: c.kind for c in each.columns if c.kind != "unused"} for each in (known, raw))
    for name in mine | given:
        if mine.get(name) != given.get(name):
            raise InputError(
                f"--like {folder}: its format {known.name} had {mine.get(name, 'no')} column {name!r}, this one has "
                f"{given.get(name, 'none')}"
            )


# ---- the stage


@dataclass(frozen=True, kw_only=True)
class KnownJob(ColumnJob):
    """One category whose values have ids already."""

    known: Path
    """Its vocabulary."""
    sha256: str
    """What that was when it was made."""


def take_vocabulary(job: KnownJob, advance: Callable[[int], None]) -> dict[str, Any]:
    """Copy a known vocabulary, write the remap by it, and return the column's facts, which are saved too.

    Args:
        job: the column.
        advance: called with the number of parts that were looked up since the last call.

    Raises:
        InputError: the vocabulary cannot be read, or is not the one that its manifest lists.
    """
    path = job.out / f"{job.feature}.parquet"
    with whole(path) as partial:
        _copy(job, partial)
    with whole(job.remap) as remap:
        write_remap(job, remap, lambda _, keys: _look_up(job, path, keys))
    advance(len(job.parts))
    facts = {"feature": job.feature, "num_ids": pq.read_metadata(path).num_rows + 1}
    write_whole(job.folder / f"{job.feature}.json", json.dumps(facts))
    return facts


def _copy(job: KnownJob, target: Path) -> None:
    try:
        source = job.known.open("rb")
    except OSError as error:
        raise InputError(f"{job.known}: cannot read it ({error.strerror or error})") from None
    with source, target.open("wb") as written:
        shutil.copyfileobj(source, written, 1 << 20)
    if file_facts(target)["sha256"] != job.sha256:
        folder = job.known.parent.parent
        raise InputError(f"{job.known}: not what its manifest lists; `recsys data verify {folder}` tells more")


def _look_up(job: KnownJob, path: Path, keys: pl.DataFrame) -> pl.DataFrame:
    """Find the ids of keys, a block of the vocabulary at a time; returns a frame of at and id."""
    vocabulary, block = pl.scan_parquet(path).select("key", "id"), job.capacity // 4
    found = [pl.DataFrame(schema={"at": keys.schema["at"], "id": pl.Int32})]
    for begin in range(0, pq.read_metadata(path).num_rows, block):
        found.append(keys.join(vocabulary.slice(begin, block).collect(), on="key").select("at", "id"))
    return pl.concat(found)
