"""One training step: forward, backward and update, by TorchRec's pipelines."""

from collections.abc import Iterator

from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist

from recsys.data.batch import Batch
from recsys.distributed import World
from recsys.sharding.plan import Plan
from recsys.tasks.click import Outputs
from recsys.training.config import TrainConfig
from recsys.training.optim import Optimizer
from recsys.training.phases import Phases


class Step:
    """Takes global batches one by one.

    Args:
        task: sharded.
        optimizer: of the task.
        config: of the run.
        plan: by which the task is sharded.
        world: the job.
    """

    def __init__(
        self, task: DistributedModelParallel, optimizer: Optimizer, config: TrainConfig, plan: Plan, world: World
    ) -> None:
        self.task, self.optimizer = task, optimizer
        self.phases = Phases()
        self._sync_every = config.sharding.sync_every
        # Where no table is sharded, there are no ids to send ahead, and nothing that TorchRec's pipeline could trace.
        # Copies of the tables (2-D parallelism) are averaged here, where steps are counted; the pipeline would do so
        # after every batch of its own accord.
        alone = {"dmp_collection_sync_interval_batches": None} if plan.tables else {}
        pipeline = TrainPipelineSparseDist if plan.tables else TrainPipelineBase
        self._pipeline = pipeline(task, optimizer.combined, world.device, **alone)

    def __call__(self, batches: Iterator[Batch], step: int) -> Outputs:
        """Train on the next batch, as step number `step`, counted from 0."""
        self.optimizer.schedule(step)
        outputs: Outputs = self._pipeline.progress(batches)
        if isinstance(self.task, DMPCollection) and (step + 1) % self._sync_every == 0:
            self.task.sync()  # copies of the tables, which 2-D parallelism trains apart
        return outputs

    def detach(self) -> None:
        """Let the task be called on batches from elsewhere; the next step attaches it again.

        TorchRec's pipeline makes the tables' forward wait for batches of its own.
        """
        if isinstance(self._pipeline, TrainPipelineSparseDist):
            self._pipeline.detach()
