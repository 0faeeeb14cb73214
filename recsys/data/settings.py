"""Settings of `recsys prepare`: what the user may say, checked before any work."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from recsys.config import InputError, dump
from recsys.data.formats import RawFormat, format_of, integer_rule
from recsys.data.ingest import Rules
from recsys.data.known import Known
from recsys.data.schema import MAX_NUM_IDS
from recsys.data.split import check_rule
from recsys.place import Place, is_local

# Resident memory of the interpreter with its packages, and of the ingest of one part.
BASE_BYTES = 300 << 20
INGEST_BYTES = 500 << 20
MIN_MEMORY = BASE_BYTES + INGEST_BYTES

NOT_RAW = (".sha256", ".md5", ".partial", ".validator", ".json", ".md", ".zip", ".tar")
"""Ends of names that folders of raw files hold besides."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Which raw log to prepare, and how."""

    format: Positional[str]
    """Format of the raw log: criteo_kaggle, criteo_1tb, avazu, kdd12, or a YAML file that describes columns."""
    paths: Positional[tuple[Place, ...]]
    """Raw files, plain or gzip, in time order, or folders of them; URLs too. Names in the order of the alphabet, as a
    shell's * gives them, are taken in the order of their numbers: day_2 before day_10."""
    out: Place
    """Folder to make, or the URL of one; it must not exist yet."""
    like: Place | None = None
    """Prepared folder whose ids this log is to have, so that what was trained on that predicts this: its vocabulary,
    schema and rules of features are taken, nothing is counted, and a value that it does not know has id 0."""
    threshold: int | None = None
    """A value keeps an id of its own when it occurs at least this often in training rows; rarer ones share id 0. The
    format's own threshold when not given."""
    max_ids: tuple[int, ...] = ()
    """Cap of a feature's ids, id 0 included: one for all, or one a feature in field order. The most frequent values
    keep theirs. The format's own caps when not given."""
    vocabulary: Literal["count", "hash", "raw"] = "count"
    """count: ids by frequency. hash: value modulo the cap, without counting, as MLPerf does; needs caps. raw: ids are
    the values themselves, 64 bits, without counting; for dynamic embeddings."""
    integers: str | None = None
    """Rule for integer columns: log1p and log3 give dense features, log_squared_bucket gives categories. The format's
    own rule when not given."""
    impressions: Literal["feature", "expand", "weight"] = "feature"
    """Of formats that count clicks and impressions: a categorical feature beside clicks > 0; one row an impression; or
    one row of weight for those with and one for those without click."""
    split: str | None = None
    """random (8:1:1), time (first 80 % train, next 10 % validate, last 10 % test), file (the last file, or the last
    folder if they are called day=..., is halved into validation and test), hash:COLUMN (8:1:1 of its values), or test
    (all rows). The format's own rule when not given; test with --like."""
    seed: int = 2021
    """Seed of the random and hash splits."""
    max_malformed: int = 0
    """Malformed rows to leave out before giving up."""
    memory: str = "4GiB"
    """Resident memory to stay below, over all processes (with Ray, of each job)."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine's cores. ray: a Ray cluster whose machines share the working folder."""
    work: Path | None = None
    """Where the working folder goes; beside `out` when not given. Needed when `out` is a URL."""
    dry_run: bool = False
    """Only estimate disk, memory and time, from the first rows."""

    def __post_init__(self) -> None:
        raw = self.raw
        if self.integers is not None:
            integer_rule(self.integers)
        split = self.rules(raw).split
        check_rule(split, [c.name for c in raw.columns if c.kind not in ("unused", "float")])
        if split == "test" and not self.like and self.vocabulary == "count":
            raise InputError(
                "--split test leaves no row to count values on; name the prepared folder that knows them by --like"
            )
        if self.threshold is not None and self.threshold < 1:
            raise InputError(f"--threshold {self.threshold} must be at least 1 (1 keeps every value)")
        if self.seed < 0 or self.max_malformed < 0:
            raise InputError("--seed and --max-malformed must not be negative")
        if self.seed >= 2**24:
            raise InputError(f"--seed {self.seed} must be below {2**24:,}")
        if not self.paths:
            raise InputError("no raw file named")
        found = Counter(str(path.resolve()) for path in self.files)
        doubled = [path for path, count in found.items() if count > 1]
        if doubled:
            raise InputError(f"{doubled[0]} is named twice")
        # A path that is not here may be a folder of many where the job will run, see `recsys launch`.
        if split == "file" and len(set(self.days)) == 1 and self.files[0].exists():
            raise InputError(
                f"--split file holds the last raw file out, or the last folder day=..., and trains on those before; "
                f"{self.days[0]} is the only one (--split random or time divides it)"
            )
        if not is_local(self.out) and self.work is None:
            raise InputError(f"--out {self.out} is no folder of this machine; name a local one for the work by --work")
        if self.known:
            self._check_known(self.known)
        else:
            self._check_caps(raw)
        if self.memory_bytes < MIN_MEMORY:
            raise InputError(f"--memory {self.memory} is too little; {MIN_MEMORY >> 20}MiB are needed at least")

    @cached_property
    def raw(self) -> RawFormat:
        """The format that `format` names."""
        return format_of(self.format)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The raw files in time order.

        Raises:
            InputError: a folder holds none.
        """
        files: list[Path] = []
        for path in self.paths:
            inside = [path]
            if path.is_dir():
                inside = [file for file in path.rglob("*") if _is_raw(file.relative_to(path)) and file.is_file()]
                if not inside:
                    raise InputError(
                        f"{path}: no raw file in this folder (names that begin with . or _ or end in "
                        f"{', '.join(NOT_RAW)} do not count)"
                    )
                inside.sort(key=str)
            files += inside
        return tuple(sorted(files, key=_natural) if files == sorted(files, key=str) else files)

    @property
    def days(self) -> tuple[str, ...]:
        """What the file rule holds out whole, of each raw file: its folder if that is called day=..., else itself."""
        return tuple(str(path.parent if "=" in path.parent.name else path) for path in self.files)

    @cached_property
    def known(self) -> Known | None:
        """The folder that `like` names."""
        return Known.load(self.like, self.raw) if self.like else None

    def _check_known(self, known: Known) -> None:
        given = {
            "--threshold": self.threshold is not None,
            "--max-ids": self.max_ids,
            "--vocabulary": self.vocabulary != "count",
            "--integers": self.integers not in (None, known.settings.integers),
            "--impressions": self.impressions not in ("feature", known.settings.impressions),
        }
        for name in filter(given.get, given):
            raise InputError(f"{name} is that of {known.folder} with --like; leave it out")

    def _check_caps(self, raw: RawFormat) -> None:
        for name, given in (("--threshold", self.threshold is not None), ("--max-ids", self.max_ids)):
            if self.vocabulary == "raw" and given:
                raise InputError(f"{name} means nothing to --vocabulary raw, which keeps every value; leave it out")
        if self.vocabulary == "raw":
            return
        caps = self.caps(raw)
        for feature, cap in caps.items():
            if cap is None and self.vocabulary == "hash":
                raise InputError(f"--vocabulary hash needs a cap for {feature}: --max-ids N, for one or all features")
            if cap is not None and not 2 <= cap <= MAX_NUM_IDS:
                raise InputError(f"--max-ids {cap} of {feature} must lie between 2 and {MAX_NUM_IDS:,} (ids are int32)")

    def caps(self, raw: RawFormat) -> dict[str, int | None]:
        """Cap of each feature's ids, in field order."""
        features = list(self.rules(raw).keys)
        if not self.max_ids:
            own = {column.name: column.max_ids for column in raw.columns}
            return {feature: own.get(feature) for feature in features}
        if len(self.max_ids) not in (1, len(features)):
            raise InputError(
                f"--max-ids takes one number or {len(features)}, one a feature; it has {len(self.max_ids)}"
            )
        return dict(zip(features, self.max_ids * (len(features) if len(self.max_ids) == 1 else 1), strict=True))

    def rules(self, raw: RawFormat) -> Rules:
        """The same for every file of the log."""
        known = self.known.settings if self.known else None
        return Rules(
            raw=raw,
            integers=known.integers if known else self.integers or raw.integers,
            impressions=known.impressions if known else self.impressions,
            split=self.split or ("test" if known else raw.split),
            seed=self.seed,
            max_malformed=self.max_malformed,
        )

    @property
    def memory_bytes(self) -> int:
        """The bytes that `memory` names."""
        text = self.memory.strip().upper().removesuffix("B")
        number = text.rstrip("KMGTI")
        try:
            return int(float(number) * UNITS[text[len(number) :].strip()])
        except (KeyError, ValueError, OverflowError):
            raise InputError(f"--memory {self.memory!r} is no amount of memory; write it like 4GiB or 900MB") from None

    @property
    def determining(self) -> dict[str, Any]:
        """The settings that determine the result, whatever engine, memory and folders are used."""
        settings = dump(self)
        for name in ("out", "memory", "engine", "work", "dry_run"):
            del settings[name]
        raw = self.raw
        rules = self.rules(raw)
        settings["raw_format"] = dump(raw)
        settings["paths"] = [str(path) for path in self.files]
        settings["threshold"] = self.threshold or raw.threshold
        settings |= {"integers": rules.integers, "impressions": rules.impressions, "split": rules.split}
        if self.known:
            known = self.known.settings
            settings |= {
                "threshold": known.threshold,
                "max_ids": list(known.max_ids),
                "vocabulary_hash": self.known.hash,
            }
        return settings


def _is_raw(name: Path) -> bool:
    return name.suffix not in NOT_RAW and not any(part.startswith((".", "_")) for part in name.parts)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key: runs of digits by their value, other text by the alphabet."""
    return [(0, int(run)) if run.isdigit() else (1, run) for run in re.split(r"([0-9]+)", str(path)) if run]
