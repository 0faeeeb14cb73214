"""Backbones: what turns field embeddings into one hidden vector a row. One file and one line here for each paper."""

from recsys.backbones.base import Backbone
from recsys.backbones.dcnv2 import DCNv2
from recsys.backbones.rankmixer import RankMixer
from recsys.backbones.wukong import Wukong

BACKBONES: dict[str, type[Backbone]] = {
    "dcnv2": DCNv2,
    "rankmixer": RankMixer,
    "wukong": Wukong,
}
