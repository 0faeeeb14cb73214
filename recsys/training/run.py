"""The run folder: what a run writes, and how it is found again."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys.config import InputError, dump, read_values, write_whole
from recsys.data.manifest import MANIFEST
from recsys.data.schema import Schema
from recsys.merge.rules import Merge
from recsys.place import place
from recsys.sharding.plan import Plan
from recsys.training.sinks import SinkConfig, Write, open_sinks


@dataclass(frozen=True)
class RunFolder:
    """Holds `*.json` for config, schema, data, plan and merge, `metrics.jsonl`, `tensorboard/` and `checkpoints/`."""

    path: Path

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> "RunFolder":
        """Take a folder for a new run, or for going on with the one in it.

        Raises:
            InputError: it holds a run and `resume` is off, or it cannot be made.
        """
        folder = cls(path)
        if folder.config.exists() and not resume:
            raise InputError(f"{path}: holds a run already; name another --out, or go on with it by --resume auto")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: cannot make the run folder ({error.strerror})") from None
        return folder

    @classmethod
    def existing(cls, path: Path) -> "RunFolder":
        """The folder of a run that was started.

        Raises:
            InputError: there is none.
        """
        if not (path / "config.json").exists():
            raise InputError(f"{path}: no config.json in it, so it is no run folder; `recsys train` makes one")
        return cls(path)

    @property
    def config(self) -> Path:
        """The config that ran."""
        return self.path / "config.json"

    @property
    def data(self) -> Path:
        """Which data the run was trained on."""
        return self.path / "data.json"

    @property
    def plan(self) -> Path:
        """Where tables live, as the run was last started."""
        return self.path / "plan.json"

    @property
    def merge(self) -> Path:
        """The merge as it was last fitted, and the order in which greedy selection takes the members."""
        return self.path / "merge.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, which `config.json` may have put elsewhere."""
        values = read_values(self.config) if self.config.exists() else {}
        elsewhere = values.get("checkpoints", {}).get("folder")
        return place(elsewhere) if elsewhere else self.path / "checkpoints"

    @property
    def id(self) -> str:
        """What tells this run from others, wherever its folder is moved."""
        file = self.path / "run.json"
        if not file.exists():
            write_whole(file, json.dumps({"id": uuid.uuid4().hex}) + "\n")
        return str(read_values(file)["id"])

    def describe(self, config: Any, schema: Schema, plan: Plan) -> None:
        """Write what is known before the first step; `config.json` last, since it marks the folder as taken."""
        schema.save(self.path)
        if not self.data.exists():
            write_whole(self.data, json.dumps(data_facts(config.data), indent=2) + "\n")
        plan.save(self.plan)
        write_whole(self.config, json.dumps(dump(config), indent=2) + "\n")

    def save_merge(self, merge: Merge, order: Sequence[str], step: int) -> None:
        """Write the merge of the members at a step, and members from the one to keep first to the one to drop first."""
        write_whole(self.merge, json.dumps({**asdict(merge), "order": list(order), "step": step}, indent=2) + "\n")

    def load_merge(self, step: int) -> tuple[Merge, list[str]] | None:
        """Read both back; None where validation has not written them at this step.

        Raises:
            InputError: the file holds something else.
        """
        if not self.merge.exists():
            return None
        try:
            values = json.loads(self.merge.read_text())
            order, written = list(values.pop("order")), values.pop("step")
            return (Merge(**values), order) if written == step else None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{self.merge}: not a merge ({error}); remove it, and evaluate fits it anew") from None

    def check_schema(self, schema: Schema) -> None:
        """Compare data with what the run was trained on.

        Raises:
            InputError: another schema, naming the first column that differs.
        """
        mine = Schema.load(self.path)
        if mine.hash == schema.hash:
            return
        for feature in {**mine.sparse, **schema.sparse}:
            trained, given = mine.sparse.get(feature), schema.sparse.get(feature)
            if trained != given:
                raise InputError(
                    f"the data does not fit the run {self.path}: feature {feature} has {given or 'no'} ids, "
                    f"the model {trained or 'no'}; evaluate on the data that it was trained on"
                )
        raise InputError(f"the data does not fit the run {self.path}: other dense columns or labels")

    def check_data(self, folder: Path) -> None:
        """Compare prepared data with what the run was trained on so far.

        Raises:
            InputError: other data, naming what differs.
        """
        if not self.data.exists():
            return
        mine, given = read_facts(self.data), data_facts(folder)
        for name, value in given.items():
            if mine.get(name) != value:
                raise InputError(
                    f"{folder} is not the data that the run {self.path} was trained on: {name} {value} instead of "
                    f"{mine.get(name)}; rows that are held out now may have been learnt before"
                )

    @contextmanager
    def writer(self, step: int, is_first: bool, sinks: SinkConfig | None = None) -> Iterator[Write]:
        """Yield `write(kind, step, values)`, which hands a record to all sinks, on rank 0; see recsys.training.sinks.

        What an earlier attempt wrote past `step`, from where this one goes on, is dropped.

        Raises:
            InputError: a sink that cannot be opened.
        """
        if is_first:
            with open_sinks(self.path, step, sinks or SinkConfig()) as write:
                yield write
        else:
            yield lambda kind, step, values: None


def read_facts(path: Path) -> dict[str, Any]:
    """Read what `data_facts` gave.

    Raises:
        InputError: the file holds something else.
    """
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot read which data the run was trained on ({error})") from None


def data_facts(folder: Path) -> dict[str, Any]:
    """What tells one prepared folder, and its split, from another: values are None where it has no manifest."""
    try:
        text = (folder / MANIFEST).read_bytes()
        manifest = json.loads(text)
    except (OSError, ValueError):
        text, manifest = None, {}
    config = manifest.get("config", {})
    return {
        "schema": Schema.load(folder).hash,
        "manifest_sha256": hashlib.sha256(text).hexdigest() if text else None,
        "split": config.get("split"),
        "seed": config.get("seed"),
        "rows": {name: split.get("num_rows") for name, split in manifest.get("splits", {}).items()},
    }
