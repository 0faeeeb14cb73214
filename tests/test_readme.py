"""What the README shows, works."""

import re
from pathlib import Path
from types import ModuleType

import torch

from recsys.cli import DATA_VERBS, VERBS
from recsys.data.prepare import prepare
from recsys.data.schema import Schema
from recsys.data.settings import PrepareConfig

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_sample_backbone_keeps_the_contract() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module = ModuleType("sample")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    backbone = module.FNN(num_fields=3, dim=4)
    assert backbone(torch.randn(5, 3, 4)).shape == (5, backbone.out_dim)
    assert backbone.Config is module.FNNConfig


def test_the_sample_format_describes_a_log(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "shop.yaml").write_text(text)
    header = "clicked,price,visits,user,query,session\n"
    rows = [f'{i % 2},{i / 4},{i},{i % 5},"shoes, size {i % 3}",s{i}\n' for i in range(100)]
    (tmp_path / "log.csv").write_text(header + "".join(rows))
    prepare(PrepareConfig(format=str(tmp_path / "shop.yaml"), paths=(tmp_path / "log.csv",), out=tmp_path / "shop"))
    schema = Schema.load(tmp_path / "shop")
    assert schema.dense == ("price", "visits")
    assert schema.sparse == {"user": 6, "query": 4}


def test_every_verb_that_it_names_exists() -> None:
    named = set(re.findall(r"`?recsys ([a-z]+)\b", TEXT)) | set(
        re.findall(r"^recsys ([a-z]+)\b", TEXT, flags=re.MULTILINE)
    )
    assert named >= {"prepare", "train", "evaluate", "doctor"}
    assert named <= set(VERBS)
    assert set(re.findall(r"recsys data ([a-z]+)\b", TEXT)) == set(DATA_VERBS)
