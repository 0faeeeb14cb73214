"""Warm start: a new run whose tensors begin as those of another run's checkpoint, where names and shapes agree."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from recsys.config import InputError, write_whole
from recsys.embeddings.config import TABLE_SEPARATOR
from recsys.training.checkpoint import folder as checkpoints
from recsys.training.checkpoint.config import WarmStartConfig
from recsys.training.checkpoint.load import names_in, read_into
from recsys.training.checkpoint.state import put, state_of
from recsys.training.optim import Optimizer
from recsys.training.provenance import data_facts, read_facts
from recsys.training.run import RunFolder


@dataclass(frozen=True)
class WarmStart:
    """What became of a warm start, by names of tensors."""

    source: str
    loaded: list[str]
    fresh: dict[str, str]
    """Ours that keep their initial values, and why."""
    skipped: list[str]
    """Theirs that nothing here asked for."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    def __str__(self) -> str:
        names = ", ".join([*self.fresh][:3]) + (", ..." if len(self.fresh) > 3 else "")
        fresh = f"{len(self.fresh)} stay fresh ({names})" if self.fresh else "none stays fresh"
        return f"warm start from {self.source}: {len(self.loaded)} tensors loaded, {fresh}, {len(self.skipped)} skipped"


def warm_start(config: WarmStartConfig, model: DistributedModelParallel, optimizer: Optimizer, data: Path) -> WarmStart:
    """Load what agrees in name and shape, whatever the plans and numbers of ranks.

    Tables of features whose ids mean other values here than there stay fresh, as far as that is known.

    Args:
        config: where from, and what.
        model: sharded.
        optimizer: of the model.
        data: prepared folder that it will be trained on.

    Raises:
        InputError: no whole checkpoint there, or none of its tensors is ours.
    """
    assert config.path is not None, "the caller looks"
    path = found(config.path)
    shapes = names_in(path)
    here, elsewhere = data_facts(data)["vocabulary"], _vocabulary(path)
    state = state_of(model, optimizer if config.optimizer else None)
    del state["step"]
    rounds: list[dict[str, Any]] = []  # several of ours may begin as one of theirs
    loaded, fresh = [], {}
    for name, value in _tensors(state, ""):
        there = _there(name, config.names)
        shape = tuple(value.size())
        if there not in shapes:
            fresh[name] = "not in the checkpoint" if there == name else f"no {there} in the checkpoint"
        elif shapes[there] != shape:
            fresh[name] = f"of shape {list(shapes[there])} there, {list(shape)} here"
        elif _mean_otherwise(here.get(_feature(name)), elsewhere.get(_feature(there))):
            fresh[name] = f"ids of {_feature(name)} are of another vocabulary there"
        else:
            if all(there in part for part in rounds):
                rounds.append({})
            next(part for part in rounds if there not in part)[there] = value
            loaded.append(name)
    if not rounds:
        raise InputError(
            f"--warm-start.path {path}: none of its tensors has name and shape of one of ours ({next(iter(fresh))}: "
            f"{next(iter(fresh.values()))}); map names by --warm-start.names HERE=THERE"
        )
    for part in rounds:
        read_into(part, path)
    put({**state, "step": 0}, model, optimizer if config.optimizer else None)
    prefixes = ("model.", "optimizer.") if config.optimizer else ("model.",)
    skipped = [name for name in shapes if name.startswith(prefixes) and name not in rounds[0]]
    return WarmStart(str(path), loaded, fresh, skipped)


def found(path: Path) -> Path:
    """The checkpoint that a path means.

    Raises:
        InputError: there is none.
    """
    if (path / checkpoints.COMPLETE).exists():
        return path
    newest = checkpoints.newest(RunFolder(path).checkpoints) or checkpoints.newest(path)
    if newest is None:
        raise InputError(f"--warm-start.path {path}: no whole checkpoint there; name one, or a run folder that has one")
    return newest


def _vocabulary(checkpoint: Path) -> dict[str, str]:
    """What the features' ids meant, where the run folder stands around the checkpoint."""
    facts = checkpoint.parent.parent / "data.json"
    return read_facts(facts).get("vocabulary", {}) if facts.exists() else {}


def _feature(name: str) -> str:
    """The feature whose table, or state of one, has this name; empty for other tensors."""
    match = re.search(rf"{TABLE_SEPARATOR}(\w+)\.", name)
    return match[1] if match else ""


def _mean_otherwise(mine: str | None, theirs: str | None) -> bool:
    return mine is not None and theirs is not None and mine != theirs


def _tensors(state: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Tensors of a nested state, by the names that they have in a checkpoint."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _there(name: str, names: tuple[str, ...]) -> str:
    if not names:
        return name
    by_here = dict(text.split("=") for text in names)
    heres = "|".join(map(re.escape, by_here))
    return re.sub(rf"(?<![\w:])(?:{heres})(?![\w:])", lambda match: by_here[match[0]], name)
