"""The table of what backbones cost."""

import pytest

from recsys.backbones import BACKBONES
from recsys.backbones.dcnv2 import DCNv2, DCNv2Config
from recsys.cli import main
from recsys.ladder import LadderConfig, rungs


def test_every_backbone_at_every_rung() -> None:
    found = rungs(LadderConfig(num_fields=5, embedding_dim=8, rungs=(1, 4)))
    assert [(rung.backbone, rung.along, rung.k) for rung in found] == [
        (name, along, k) for name in BACKBONES for along, k in (("width", 1), ("width", 4), ("depth", 4))
    ]
    dcnv2 = DCNv2(5, 8, DCNv2Config(num_cross_layers=12, hidden=(256,) * 4 + (128,) * 4))
    (deep,) = (rung for rung in found if rung.backbone == "dcnv2" and rung.along == "depth")
    assert (deep.num_parameters, deep.flops) == (dcnv2.num_parameters(), dcnv2.flops())


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--rungs", "1", "2"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in BACKBONES)
    assert "704,912" in text  # DCNv2 at its default, 27 fields of 16


def test_rungs_below_the_default_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backbones", "--rungs", "0.5"]) == 2
    assert "must lie between 1 and 10,000" in capsys.readouterr().err
