"""The run folder: what a run writes, and how it is found again."""

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recsys.config import InputError, dump, read_values, write_whole
from recsys.data.schema import Schema
from recsys.merge.rules import Merge
from recsys.place import place
from recsys.sharding.plan import Plan
from recsys.training.provenance import data_facts, difference, other_split, other_vocabulary, read_facts
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
                    f"the model {trained or 'no'}; prepare it by --like the data that it was trained on"
                )
        raise InputError(f"the data does not fit the run {self.path}: other dense columns or labels")

    def check_data(self, folder: Path) -> None:
        """Compare prepared data with what the run was trained on so far.

        Raises:
            InputError: other data, naming what differs.
        """
        if self.data.exists() and (different := difference(read_facts(self.data), data_facts(folder))):
            raise InputError(
                f"{folder} is not the data that the run {self.path} was trained on: {different}; rows that are held "
                "out now may have been learnt before"
            )

    def check_held_out(self, folder: Path) -> None:
        """See that ids of prepared data mean what they meant in training, and that held-out rows were held out then.

        Raises:
            InputError: another split of the same log, or another vocabulary, naming the first feature.
        """
        if not self.data.exists():
            return
        mine, given = read_facts(self.data), data_facts(folder)
        if different := other_split(mine, given):
            raise InputError(
                f"{folder} is another split of the log that the run {self.path} was trained on: {different}; rows that "
                "are held out there may have been learnt"
            )
        if feature := other_vocabulary(mine, given):
            raise InputError(
                f"{folder} does not fit the run {self.path}: ids of feature {feature} are of another vocabulary; "
                "prepare it by --like the data that the run was trained on"
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
