"""Plain PyTorch as FuxiCTR has it: an nn.Embedding a field, and Adam over everything, in fp32.

Gradients of tables are as large as the tables, and Adam updates every row of them at every step.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from baselines import Job, hotness, ids_by_field
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.members import MemberSpec
from recsys.model import Member


class PlainModel(nn.Module):
    """One member over its tables."""

    def __init__(self, spec: MemberSpec, job: Job) -> None:
        super().__init__()
        self.schema: Schema = job.schema
        self.tables = nn.ModuleList(
            nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
            for table in job.tables(spec)
        )
        self.member = Member(spec, job.schema).to(job.device)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B]; a field of several ids has the sum of their vectors."""
        rows = len(batch.labels)
        fields = [
            table(ids.view(rows, size)).sum(1) if size > 1 else table(ids)
            for table, ids, size in zip(
                self.tables, ids_by_field(batch, self.schema), hotness(self.schema), strict=True
            )
        ]
        return self.member(torch.stack(fields, dim=1), batch.dense)


class Plain:
    """Trains it; see `Baseline`."""

    def __init__(self, job: Job) -> None:
        self.device = job.device
        self.models = [PlainModel(spec, job) for spec in job.specs]
        self.optimizers = [
            torch.optim.Adam(
                [
                    {"params": model.tables.parameters(), "lr": job.table_lr},
                    {"params": model.member.parameters(), "lr": job.dense_lr},
                ]
            )
            for model in self.models
        ]

    def step(self, batches: Iterator[Batch]) -> Tensor:
        """Train every member on the next batch."""
        batch = next(batches).to(self.device)
        losses = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            loss = binary_cross_entropy_with_logits(model(batch), batch.labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).sum()
