"""What the README shows, works."""

import re
from pathlib import Path
from types import ModuleType

import torch

from recsys.cli import VERBS

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_sample_backbone_keeps_the_contract() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module = ModuleType("sample")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    backbone = module.FNN(num_fields=3, dim=4)
    assert backbone(torch.randn(5, 3, 4)).shape == (5, backbone.out_dim)
    assert backbone.Config is module.FNNConfig


def test_every_verb_that_it_names_exists() -> None:
    named = set(re.findall(r"`?recsys ([a-z]+)\b", TEXT)) | set(
        re.findall(r"^recsys ([a-z]+)\b", TEXT, flags=re.MULTILINE)
    )
    assert named >= {"prepare", "train", "evaluate", "doctor"}
    assert named <= set(VERBS)
