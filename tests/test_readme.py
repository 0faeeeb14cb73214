"""What the README shows, works."""

import itertools
import re
import shlex
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.flop_counter import FlopCounterMode

from recsys.backbones import BACKBONES
from recsys.cli import DATA_VERBS, VERBS
from recsys.data.prepare import prepare
from recsys.data.schema import Schema
from recsys.data.settings import PrepareConfig
from recsys.members import parse_members

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_sample_backbone_keeps_the_contract() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    module = ModuleType("sample")
    exec(compile(code, "README.md", "exec"), module.__dict__)
    backbone = module.NFM(num_fields=3, dim=4)
    x_BFD = torch.randn(5, 3, 4)
    assert backbone(x_BFD).shape == (5, backbone.out_dim)
    pairs = x_BFD[:, 0] * x_BFD[:, 1] + x_BFD[:, 0] * x_BFD[:, 2] + x_BFD[:, 1] * x_BFD[:, 2]
    torch.testing.assert_close(backbone(x_BFD), backbone.mlp(pairs))
    with FlopCounterMode(display=False) as counter:
        backbone(x_BFD)
    assert counter.get_total_flops() == 5 * backbone.flops()
    wider = module.NFM(3, 4, module.NFMConfig().ladder(4, "width"))
    assert wider.flops() > backbone.flops()
    assert "nfm" not in BACKBONES, "it exists: the README needs another example"


def test_the_backbones_that_it_lists_are_all() -> None:
    (listed,) = re.findall(r"with parameters and FLOPs: (.*?)\.\n", TEXT, flags=re.DOTALL)
    names = re.findall(r"\b[a-z0-9_]+\b", re.sub(r"\(.*?\)", "", listed, flags=re.DOTALL))
    assert names == list(BACKBONES)
    assert len(names) == 13, "the README says thirteen, and DCNv2, Wukong, RankMixer and ten more"


def test_the_members_that_it_trains_can_be_read() -> None:
    lines = re.findall(r"^ *(?:recsys train )?criteo_kaggle .*--members (.*)", TEXT, flags=re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        texts = list(itertools.takewhile(lambda text: not text.startswith("--"), shlex.split(line)))
        assert len(parse_members(texts, 0)) >= 2


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
    named = set(re.findall(r"`?recsys ([a-z-]+)\b", TEXT)) | set(
        re.findall(r"^recsys ([a-z-]+)\b", TEXT, flags=re.MULTILINE)
    )
    assert named >= {"prepare", "train", "evaluate", "doctor"}
    assert named <= set(VERBS)
    assert set(re.findall(r"recsys data ([a-z]+)\b", TEXT)) == set(DATA_VERBS)
