"""The settings of the merging paper (arXiv 2512.07650) on its three datasets, for its eight backbones and any group.

Known from the paper and its authors' code: the eight backbones, batch 4096, embedding dimension 16, MLP 1024-512-256,
Adam, learning rates of 3e-5 to 1e-3, random 8:1:1 split, and how each dataset is prepared (the command in each recipe).
Our choice, where it is silent or we differ: row-wise Adagrad on the tables, which no Adam has the memory for at a
terabyte; 1e-3 for all dense layers; sizes of Wukong (within its own paper's grid) and of RankMixer. None of these has
been run on a whole dataset by us yet.

All eight train side by side unless `--members` names a group: `--members dcnv2`, `--members dcnv2*4`, `--members
wukong rankmixer finalmlp`.
"""

from pathlib import Path

from recsys.backbones.dcn import DCNConfig
from recsys.backbones.dcnv2 import DCNv2Config
from recsys.backbones.deepfm import DeepFMConfig
from recsys.backbones.finalmlp import FinalMLPConfig
from recsys.backbones.fnn import FNNConfig
from recsys.backbones.ipnn import IPNNConfig
from recsys.backbones.rankmixer import RankMixerConfig
from recsys.backbones.wukong import WukongConfig
from recsys.members import BackboneConfigs, ModelConfig
from recsys.training.config import LoopConfig, TrainConfig
from recsys.training.optim import OptimizerConfig

EIGHT = ("fnn", "ipnn", "deepfm", "dcn", "dcnv2", "finalmlp", "wukong", "rankmixer")
HIDDEN = (1024, 512, 256)

SIZES = BackboneConfigs(
    fnn=FNNConfig(hidden=HIDDEN),
    ipnn=IPNNConfig(hidden=HIDDEN),
    deepfm=DeepFMConfig(hidden=HIDDEN),
    dcn=DCNConfig(hidden=HIDDEN),
    dcnv2=DCNv2Config(hidden=HIDDEN),
    finalmlp=FinalMLPConfig(hidden1=HIDDEN, hidden2=HIDDEN),
    wukong=WukongConfig(num_layers=2, num_fm=16, num_linear=16, fm_rank=24, hidden=(512,)),
    rankmixer=RankMixerConfig(num_tokens=8, token_dim=128, num_layers=2),
)


def criteo_paper() -> TrainConfig:
    """Criteo Kaggle: `recsys prepare criteo_kaggle FILE --integers log_squared_bucket --threshold 10`, 39 fields."""
    return _paper("criteo")


def avazu_paper() -> TrainConfig:
    """Avazu: `recsys prepare avazu FILE --threshold 2`, 24 fields: hour becomes hour, weekday and is_weekend."""
    return _paper("avazu")


def kdd12_paper() -> TrainConfig:
    """KDD Cup 2012 track 2: `recsys prepare kdd12 FILE --threshold 10 --impressions feature`, 11 fields."""
    return _paper("kdd12")


def _paper(name: str) -> TrainConfig:
    return TrainConfig(
        data=Path("data") / f"{name}_paper",
        out=Path("runs") / f"{name}_paper",
        members=EIGHT,
        model=ModelConfig(embedding_dim=16),
        backbones=SIZES,
        optimizer=OptimizerConfig(table_lr=0.05, dense_lr=1e-3),
        train=LoopConfig(batch_size=4096),
    )
