"""TorchRec out of the box, as its DLRM example has it: its planner, its sharders, its pipeline, in fp32.

An EmbeddingBagCollection a member under DistributedModelParallel, Adagrad fused into the backward by
apply_optimizer_in_backward, Adam on the rest, TrainPipelineSparseDist.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from baselines import Job
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.embeddings.init import init_tables
from recsys.embeddings.tables import TABLE_SEPARATOR
from recsys.members import MemberSpec
from recsys.model import Member


class SparseArch(nn.Module):
    """Tables of one member, its fields in schema order."""

    def __init__(self, spec: MemberSpec, schema: Schema) -> None:
        super().__init__()
        self.features = list(schema.sparse)
        self.dim = spec.model.embedding_dim
        self.embedding_bag_collection = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(
                    name=f"{spec.name}{TABLE_SEPARATOR}{feature}",
                    embedding_dim=self.dim,
                    num_embeddings=num_ids,
                    feature_names=[feature],
                )
                for feature, num_ids in schema.sparse.items()
            ],
            device=torch.device("meta"),
        )

    def forward(self, ids: KeyedJaggedTensor) -> Tensor:
        """Look up ids: x_BFD."""
        pooled = self.embedding_bag_collection(ids)
        fields = torch.cat([pooled[feature] for feature in self.features], dim=1)
        return fields.reshape(-1, len(self.features), self.dim)


class TrainModel(nn.Module):
    """Members and their losses, as the pipeline wants them."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.sparse = nn.ModuleList(SparseArch(spec, job.schema) for spec in job.specs)
        self.members = nn.ModuleList(Member(spec, job.schema).to(job.device) for spec in job.specs)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss to differentiate, and the same without a gradient."""
        losses = [
            binary_cross_entropy_with_logits(member(sparse(batch.sparse), batch.dense), batch.labels)
            for sparse, member in zip(self.sparse, self.members, strict=True)
        ]
        loss = torch.stack(losses).sum()
        return loss, loss.detach()


class TorchRecDefault:
    """Trains it; see `Baseline`. Needs a process group."""

    def __init__(self, job: Job) -> None:
        from torch.distributed.optim import _apply_optimizer_in_backward  # noqa: PLC0415  (importing it warns)

        model = TrainModel(job)
        _apply_optimizer_in_backward(torch.optim.Adagrad, model.sparse.parameters(), {"lr": job.table_lr})
        self.model = DistributedModelParallel(model, device=job.device)
        # TorchRec draws initial values of its own; the comparison is from the same ones.
        init_tables(self.model, job.start().embedding.table_start)
        dense = KeyedOptimizerWrapper(
            dict(in_backward_optimizer_filter(self.model.named_parameters())),
            lambda params: torch.optim.Adam(params, lr=job.dense_lr),
        )
        optimizer = CombinedOptimizer([self.model.fused_optimizer, dense])
        self.pipeline = TrainPipelineSparseDist(self.model, optimizer, job.device)

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Train on the next batch."""
        return self.pipeline.progress(batches)
