"""The manifest: what `recsys prepare` wrote, file by file, saved as `manifest.json` beside the schema."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.config import InputError, load

MANIFEST = "manifest.json"
TIMINGS = "timings.json"
"""What the stages took; unlike the manifest it differs from run to run."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """What one split holds."""

    num_rows: int
    label_mean: float
    """Of the first label; 0 where there is no row."""


@dataclass(frozen=True, kw_only=True)
class FileFacts:
    """What one file holds."""

    bytes: int
    sha256: str
    num_rows: int | None = None
    """Of Parquet files."""
    label_sum: int | None = None
    """Of the first label, in the files of a split."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Those facts of a prepared folder that can be checked or shown; `manifest.json` also says how it was made."""

    schema_hash: str
    num_rows: int
    splits: dict[str, SplitFacts]
    files: dict[str, FileFacts]
    """By name within the folder, with slashes; every file but the manifest itself and the timings."""
    null_share: dict[str, float] = field(default_factory=dict)
    """By raw column."""
    num_malformed: int = 0
    """Rows that were left out."""

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a prepared folder.

        Raises:
            InputError: it is missing, does not hold a manifest, or was written before manifests listed files.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
        except OSError as error:
            raise InputError(f"{path}: cannot read it ({error.strerror or error}); prepare again") from None
        except ValueError as error:
            raise InputError(f"{path}: not JSON: {error}; prepare again") from None
        if isinstance(values, dict) and "files" not in values:
            raise InputError(f"{path}: it lists no files, so an older version wrote it; prepare again")
        known = {name: values[name] for name in _names(cls) if name in values} if isinstance(values, dict) else values
        return load(cls, known, str(path))


def _names(kind: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(kind)]
