"""MLPerf's DLRM-DCNv2 on Criteo 1TB (training v3.0 and later), as its reference sizes it.

Known from the benchmark: tables capped at 40 million rows, 214 ids a row, dimension 128, sizes of the dense part,
Adagrad with one accumulator an element at 0.005 and eps 1e-8, batches of 65,536 rows. Our choice: Adam at 1e-3 on the
dense part, where the reference has Adagrad. It has not been run on the whole log by us.
"""

from pathlib import Path

from recsys.backbones.dlrm_dcn import DLRMDCNConfig
from recsys.data.formats import MLPERF_NUM_IDS
from recsys.data.loader import LoaderConfig
from recsys.data.schema import Schema
from recsys.members import BackboneConfigs, ModelConfig
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.optim import OptimizerConfig


def mlperf_dlrm_dcnv2() -> TrainConfig:
    """MLPerf's DLRM-DCNv2 on Criteo 1TB: `recsys prepare criteo_1tb DAYS --vocabulary hash`, multi-hot."""
    return TrainConfig(
        data=Path("data/criteo_1tb"),
        out=Path("runs/mlperf_dlrm_dcnv2"),
        members=("dlrm_dcn",),
        model=ModelConfig(embedding_dim=128, dense_hidden=(512, 256), precision="bf16"),
        backbones=BackboneConfigs(dlrm_dcn=DLRMDCNConfig(rank=512, hidden=(1024, 1024, 512, 256))),
        optimizer=OptimizerConfig(tables="adagrad", table_lr=0.005, table_eps=1e-8, dense_lr=1e-3),
        loader=LoaderConfig(multi_hot="pareto"),
        train=LoopConfig(batch_size=65_536),
    )


def mlperf_schema() -> Schema:
    """What its data look like, for plans on machines that do not have them."""
    return Schema(
        name="criteo_1tb",
        dense=tuple(f"I{index}" for index in range(1, 14)),
        sparse={f"C{index}": rows for index, rows in enumerate(MLPERF_NUM_IDS, start=1)},
        labels=("label",),
    )
