"""MLPerf's DLRM-DCNv2 on Criteo 1TB (training v3.0 and later).

Known from the benchmark's rules, its reference (mlcommons/training, recommendation_v2/torchrec_dlrm) and its reference
convergence points (mlcommons/logging, rcps_dlrm_dcnv2.json): tables capped at 40 million rows, 204,184,588 in all, of
dimension 128; 214 ids a row, drawn uniformly; bottom MLP 13-512-256-128, three cross layers of rank 512, top MLP
1024-1024-512-256-1; Adagrad at a constant 0.004 on everything (0.0034 at batches of 135,168), with one accumulator an
element of the tables and eps 1e-8; batches of 65,536 rows; one epoch, validated every twentieth of it on the first half
of day 23; target AUC .80275, reached by the reference after .70 to .95 of the epoch.

What is otherwise here, since the framework has no words for it or computes it otherwise:

- the last layer of the bottom MLP is linear, where the reference has one more ReLU;
- eps is 1e-10 in the dense part's Adagrad, which is torch's own;
- tables start uniform within one bound, `init_scale`, where the reference has 1 / sqrt(rows) of each table, and dense
  layers by Xavier's rule;
- companions of an id are drawn by the reference's distribution from another generator, and dense columns are
  ln(1 + x), where it has ln(x - min + 2);
- arithmetic of the dense part is bf16 with fp32 weights, where its is fp32; tables are fp32.

It has not been run on the whole log by us. Tables take 104.5 GB and their accumulators as much: see docs/benchmarks.md
for what fits where.
"""

from pathlib import Path

from recsys.backbones.dlrm_dcn import DLRMDCNConfig
from recsys.data.formats import MLPERF_NUM_IDS
from recsys.data.loader import LoaderConfig
from recsys.data.schema import Schema
from recsys.members import BackboneConfigs, ModelConfig
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.optim import OptimizerConfig
from recsys.training.sinks import SinkConfig


def mlperf_dlrm_dcnv2() -> TrainConfig:
    """MLPerf's DLRM-DCNv2 on Criteo 1TB: `recsys prepare criteo_1tb DAYS --vocabulary hash`, multi-hot while loading.

    MLPerf's log lines go to stdout; `--sinks.mlperf FILE` has them in a file. Tables are as large as the data say, so
    that on a small log the same recipe is a model in miniature.
    """
    return TrainConfig(
        data=Path("data/criteo_1tb"),
        out=Path("runs/mlperf_dlrm_dcnv2"),
        members=("dlrm_dcn",),
        model=ModelConfig(embedding_dim=128, dense_hidden=(512, 256), precision="bf16"),
        backbones=BackboneConfigs(dlrm_dcn=DLRMDCNConfig(num_cross_layers=3, rank=512, hidden=(1024, 1024, 512, 256))),
        optimizer=OptimizerConfig(tables="adagrad", table_lr=0.004, table_eps=1e-8, dense="adagrad", dense_lr=0.004),
        loader=LoaderConfig(multi_hot="uniform"),
        train=LoopConfig(
            batch_size=65_536, num_epochs=1, validations_per_epoch=20, target_auc=0.80275, pipeline="sparse_dist"
        ),
        sinks=SinkConfig(mlperf=Path("-")),
    )


def mlperf_schema() -> Schema:
    """What its data look like, for plans on machines that do not have them."""
    return Schema(
        name="criteo_1tb",
        dense=tuple(f"I{index}" for index in range(1, 14)),
        sparse={f"C{index}": rows for index, rows in enumerate(MLPERF_NUM_IDS, start=1)},
        labels=("label",),
    )
