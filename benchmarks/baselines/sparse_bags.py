"""Plain PyTorch with sparse gradients: an nn.EmbeddingBag(sparse=True) a field, Adagrad or SparseAdam on the tables.

Only rows that a batch looks up have a gradient. Adam on the rest, in fp32.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from baselines import Job, hotness, ids_by_field
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.members import MemberSpec
from recsys.model import Member


class SparseModel(nn.Module):
    """One member over its tables."""

    def __init__(self, spec: MemberSpec, job: Job) -> None:
        super().__init__()
        self.schema: Schema = job.schema
        self.tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table, freeze=False, mode="sum", sparse=True) for table in job.tables(spec)
        )
        self.member = Member(spec, job.schema).to(job.device)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]."""
        rows = len(batch.labels)
        fields = [
            table(ids.view(rows, size))
            for table, ids, size in zip(
                self.tables, ids_by_field(batch, self.schema), hotness(self.schema), strict=True
            )
        ]
        return self.member(torch.stack(fields, dim=1), batch.dense)


class SparseBags:
    """Trains it; see `Baseline`."""

    def __init__(self, job: Job, tables: Literal["adagrad", "sparse_adam"] = "adagrad") -> None:
        self.device = job.device
        self.models = [SparseModel(spec, job) for spec in job.specs]
        kind = torch.optim.Adagrad if tables == "adagrad" else torch.optim.SparseAdam
        self.optimizers: list[torch.optim.Optimizer] = []
        for model in self.models:
            self.optimizers.append(kind(model.tables.parameters(), lr=job.table_lr))
            self.optimizers.append(torch.optim.Adam(model.member.parameters(), lr=job.dense_lr))

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Train every member on the next batch."""
        batch = next(batches).to(self.device)
        loss = torch.stack(
            [binary_cross_entropy_with_logits(model(batch), batch.labels) for model in self.models]
        ).sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()
