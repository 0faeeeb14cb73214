"""Backbones: what turns field embeddings into one hidden vector a row. One file and one line here for each paper."""

import importlib

from recsys.backbones.autoint import AutoInt
from recsys.backbones.base import Backbone
from recsys.backbones.dcn import DCN
from recsys.backbones.dcnv2 import DCNv2
from recsys.backbones.deepfm import DeepFM
from recsys.backbones.dlrm import DLRM
from recsys.backbones.dlrm_dcn import DLRMDCN
from recsys.backbones.finalmlp import FinalMLP
from recsys.backbones.fnn import FNN
from recsys.backbones.gdcn import GDCN
from recsys.backbones.ipnn import IPNN
from recsys.backbones.masknet import MaskNet
from recsys.backbones.rankmixer import RankMixer
from recsys.backbones.wukong import Wukong


class _Backbones(dict[str, type[Backbone]]):
    """Backbones by name. It lists ours, and also finds one of the user's own by its path, `package.module:Class`."""

    def __missing__(self, path: str) -> type[Backbone]:
        module, colon, name = path.partition(":")
        if not colon:
            raise KeyError(path)
        kind: type[Backbone] = getattr(importlib.import_module(module), name)  # `parse_members` looked at it before
        return kind


BACKBONES: dict[str, type[Backbone]] = _Backbones(
    {
        "autoint": AutoInt,
        "dcn": DCN,
        "dcnv2": DCNv2,
        "deepfm": DeepFM,
        "dlrm": DLRM,
        "dlrm_dcn": DLRMDCN,
        "finalmlp": FinalMLP,
        "fnn": FNN,
        "gdcn": GDCN,
        "ipnn": IPNN,
        "masknet": MaskNet,
        "rankmixer": RankMixer,
        "wukong": Wukong,
    }
)
