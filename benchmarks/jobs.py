"""Jobs whose cases can take turns: one setting, trained by us and by baselines, beside its floor.

A job runs in this process, or on ranks of its own under torchrun (`RankedJob`), which wait while others have their
turn. Run as a script, this is such a rank: it takes lines of JSON from its standard input, and answers each with one.
"""

import contextlib
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist

from baselines import Baseline
from baselines import Job as BaselineJob
from baselines.plain import Plain
from baselines.sparse_bags import SparseBags
from baselines.torchrec_default import TorchRecDefault
from harness import Runner, runner
from recsys import native
from recsys.backbones.fused import unfused
from recsys.config import InputError, dump, load
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.distributed import World, process_group
from recsys.embeddings.precision import BYTES
from recsys.sharding.native import NativeTables
from recsys.sharding.torchrec import batches_of_tables
from recsys.sharding.workload import STATE_VALUES
from recsys.training.phases import PHASES
from recsys.training.trainer import Trainer
from roofline import Floor, TableTraffic, ceilings, member_products
from workload import Setting

OURS, FLOOR = "ours", "floor"
BASELINES: dict[str, Callable[[BaselineJob], Baseline]] = {
    "plain_pytorch": Plain,
    "sparse_bags": SparseBags,
    "torchrec_default": TorchRecDefault,
}
COUNTED_BATCHES = 4
"""In which rows are counted that batches look up."""


class Job(Protocol):
    """The cases of one setting."""

    def cases(self) -> dict[str, Runner]:
        """What takes turns, by name."""
        ...

    def report(self) -> dict[str, Any]:
        """What was measured beside the turns: phases, ceilings, bytes and FLOPs of a step."""
        ...


class LocalJob:
    """The cases of one setting in this process; every rank has the same ones.

    Args:
        setting: what is trained.
        data: its prepared folder.
        baselines: which of `BASELINES` to train beside us.
        world: the process group.
    """

    def __init__(self, setting: Setting, data: Path, baselines: tuple[str, ...], world: World) -> None:
        self.setting, self.world = setting, world
        config, self.schema = setting.config(data), Schema.load(data)
        self.specs = config.specs()
        trainer = Trainer(config, world)
        trainer.task.train()
        self._steps: dict[str, Callable[[], object]] = {}
        self._streams: list[Iterator[Batch]] = []
        self._loader, self._task = trainer.loader, trainer.task
        self._phases: list[dict[str, float]] = []
        batches = self._stream()

        def step() -> None:
            trainer.one_step.phases.take()  # what took time since the last step was another case's
            trainer.log.update(trainer.train_step(batches))  # with the training metrics, as the loop does
            self._phases.append(trainer.one_step.phases.take())

        self._steps[OURS] = step
        job = BaselineJob(
            specs=self.specs,
            schema=self.schema,
            table_lr=setting.optimizer.table_lr,
            dense_lr=setting.optimizer.dense_lr,
            device=world.device,
        )
        for name in baselines:
            self._steps[name] = _training(BASELINES[name](job), self._stream())
        local_rows = trainer.loader.local_batch_size
        self._products = [
            product for spec in self.specs for product in member_products(spec, self.schema, local_rows, world.device)
        ]
        self._floor = Floor(self._products, torch.bfloat16, world.device)
        self._steps[FLOOR] = self._floor

    def cases(self) -> dict[str, Runner]:
        """Us, the baselines, and the floor."""
        return {name: runner(step, self._synchronize) for name, step in self._steps.items()}

    def report(self) -> dict[str, Any]:
        """Of this rank; FLOPs and bytes are those of a step."""
        traffic = self._traffic()
        found = ceilings(self._products, self.world.device, self._synchronize)
        return {
            "phase_ms": {
                phase: 1e3 * statistics.median(step.get(phase, 0.0) for step in self._phases)
                for phase in (*PHASES, "other")
            },
            "ceilings": asdict(found),
            "flops": self._floor.flops,
            "table_bytes": traffic.total,
            "table_floor_ms": 1e3 * traffic.seconds(found),
            "threads": torch.get_num_threads(),
            "native": native.available("tables") and native.available("fused"),
            "device": self.world.device.type
            if self.world.device.type == "cpu"
            else torch.cuda.get_device_name(self.world.device),
        }

    def close(self) -> None:
        """End the threads that load."""
        for stream in self._streams:
            stream.close()  # type: ignore[attr-defined]

    def _stream(self) -> Iterator[Batch]:
        """Batches of our loader without end, for one case."""
        self._streams.append(self._loader.stream())
        return self._streams[-1]

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        if self.world.size > 1:
            dist.barrier()

    def _traffic(self) -> TableTraffic:
        """Of the batches that come first, on average, with the rows that they look up counted."""
        num_batches = min(COUNTED_BATCHES, self._loader.steps_per_epoch)
        bags = unique = 0
        stream = self._loader.epoch(0)
        for batch in itertools.islice(stream, num_batches):
            ids = batch.sparse
            bags += ids.lengths().numel()
            unique += sum(len(ids[feature].values().unique()) for feature in self.schema.sparse)
        stream.close()  # type: ignore[attr-defined]
        of_row, of_element = STATE_VALUES[self.setting.optimizer.tables]
        dim = self.setting.dim
        members = 1 if self.setting.model.tables == "shared" else len(self.specs)
        parts = [part.forward for part in batches_of_tables(self._task)]
        halved = all(isinstance(part, NativeTables) and part.dtype.itemsize == 2 for part in parts)
        return TableTraffic(
            bags=members * bags // num_batches,
            unique_rows=members * unique // num_batches,
            row_bytes=dim * BYTES[self.setting.model.table_dtype],
            state_bytes=4 * (of_row + of_element * dim),
            output_bytes=(2 if halved else 4) * dim,
        )


def _training(baseline: Baseline, batches: Iterator[Batch]) -> Callable[[], object]:
    def step() -> None:
        with unfused():  # PyTorch's own operators, as others would have them
            baseline.step(batches)

    return step


class RankedJob:
    """The cases of one setting on ranks of its own, which torchrun starts on this machine.

    Raises:
        InputError: a rank ended before its time; what it said stands above.
    """

    def __init__(self, setting: Setting, data: Path) -> None:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks),
            str(Path(__file__).resolve()), str(data), json.dumps(dump(setting)),
        ]  # fmt: skip
        # What `process_group` gives a rank as well; torchrun warns where nobody said it.
        threads = max(1, len(os.sched_getaffinity(0)) // setting.ranks)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._names: list[str] = self._ask({"ask": "cases"})

    def cases(self) -> dict[str, Runner]:
        """Us and the floor; a rank's time is that of the slowest."""
        return {name: self._runner(name) for name in self._names}

    def report(self) -> dict[str, Any]:
        """Of the first rank."""
        return self._ask({"ask": "report"})

    def close(self) -> None:
        """End the ranks."""
        with self._process as process:  # closes the pipes, and waits
            assert process.stdin, "a pipe"
            process.stdin.close()

    def _runner(self, name: str) -> Runner:
        return lambda steps: self._ask({"ask": "run", "case": name, "steps": steps})

    def _ask(self, what: Mapping[str, Any]) -> Any:
        assert self._process.stdin, "a pipe"
        assert self._process.stdout, "a pipe"
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)["answer"]
        self.close()
        raise InputError(f"a rank of the job ended with {self._process.returncode}; its standard error tells why")


class Jobs:
    """Several jobs that are alive together, and end together."""

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self.world: World | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.__exit__(kind, error, trace)

    def start(self, setting: Setting, data: Path, baselines: tuple[str, ...], *, ranked: bool) -> Job:
        """Start the job of a setting, on ranks of its own or in this process."""
        if ranked:
            away = RankedJob(setting, data)
            self._held.callback(away.close)
            return away
        if self.world is None:
            self.world = self._held.enter_context(process_group())
        here = LocalJob(setting, data, baselines, self.world)
        self._held.callback(here.close)
        return here


def quieten_libraries() -> None:
    """Leave out what torch and torchrec tell their own developers, but nothing of ours."""
    warnings.simplefilter("ignore")
    for name in (None, "torch", "torch.fx._symbolic_trace", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("recsys").setLevel(logging.INFO)


def serve(setting: Setting, data: Path) -> None:
    """Be one rank of a job: do what the first rank is told to, until its standard input ends."""
    quieten_libraries()
    with process_group() as world:
        job = LocalJob(setting, data, (), world)
        cases = job.cases()
        while True:
            told: list[Any] = [json.loads(sys.stdin.readline() or "null") if world.is_first else None]
            dist.broadcast_object_list(told, src=0)
            asked = told[0]
            if asked is None:
                break
            answer: Any = list(cases)
            if asked["ask"] == "run":
                answer = cases[asked["case"]](asked["steps"])
            elif asked["ask"] == "report":
                answer = job.report()
            if world.is_first:
                print(json.dumps({"answer": answer}), flush=True)
        job.close()


if __name__ == "__main__":
    serve(load(Setting, json.loads(sys.argv[2])), Path(sys.argv[1]))
