"""Which data a run was trained on, and whether other data are the same, or at least fit."""

import hashlib
import json
from pathlib import Path
from typing import Any

from recsys.config import InputError
from recsys.data.manifest import MANIFEST
from recsys.data.schema import Schema

FACTS = ("schema", "split", "seed", "rows", "vocabulary", "log", "manifest_sha256")
"""What is known of data; what says most comes first."""


def data_facts(folder: Path) -> dict[str, Any]:
    """What tells one prepared folder, and its split, from another: values are None where it has no manifest."""
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
    except (OSError, ValueError):
        text, manifest = None, {}
    config, files = manifest.get("config", {}), manifest.get("files", {})
    clicks = sum(file.get("label_sum") or 0 for file in files.values())
    log = [manifest.get("num_rows"), clicks, manifest.get("null_share")]
    vocabulary = {
        Path(name).stem: file["sha256"][:16] for name, file in files.items() if name.startswith("vocabulary/")
    }
    return {
        "schema": Schema.load(folder).hash,
        "manifest_sha256": hashlib.sha256(text).hexdigest() if text else None,
        "log": hashlib.sha256(json.dumps(log).encode()).hexdigest()[:16] if text else None,
        "split": config.get("split"),
        "seed": config.get("seed"),
        "rows": {name: split.get("num_rows") for name, split in manifest.get("splits", {}).items()},
        "vocabulary": vocabulary,
    }


def read_facts(path: Path) -> dict[str, Any]:
    """Read what `data_facts` gave, maybe to an older version, which knew less.

    Raises:
        InputError: the file holds something else.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot read which data the run was trained on ({error})") from None


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first fact in which data differ, of those that both know."""
    for name in (name for name in FACTS if name in wanted and name in found):
        if wanted[name] != found[name]:
            if name == "vocabulary":
                return f"feature {other_vocabulary(wanted, found)} has another vocabulary"
            return f"{name} {found[name]} instead of {wanted[name]}"
    return None


def other_vocabulary(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The first feature whose ids mean other values here and there, as far as both know."""
    mine, theirs = wanted.get("vocabulary") or {}, found.get("vocabulary") or {}
    return next((feature for feature in mine if theirs.get(feature, mine[feature]) != mine[feature]), None)


def check_labels(folder: Path) -> None:
    """See that training rows have labels of both kinds, where the manifest tells.

    Raises:
        InputError: they have not.
    """
    try:
        splits = json.loads((folder / MANIFEST).read_bytes())["splits"]
        num_rows, mean = splits["train"]["num_rows"], splits["train"]["label_mean"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if num_rows and mean in (0, 1):
        raise InputError(
            f"{folder}: all {num_rows:,} rows of train have label {mean:.0f}, so there is nothing to learn"
        )


def other_split(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """How two splits of one log differ; None of other logs, or of one split."""
    if wanted.get("log") is None or wanted["log"] != found.get("log"):
        return None
    return difference(*({name: facts.get(name) for name in ("split", "seed", "rows")} for facts in (wanted, found)))
