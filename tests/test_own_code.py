"""Recipes and backbones of the user's own, and what is said of those that cannot be."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.cli import main
from recsys.config import InputError
from recsys.members import BackboneConfigs, ModelConfig, describe_member, parse_members
from recsys.recipes import find_recipe, synthetic

NETS = '''
from dataclasses import dataclass, field
from typing import Any, ClassVar

from recsys.backbones.base import Backbone
from recsys.backbones.layers import MLP, MLPSizes, linear_flops


@dataclass(frozen=True, kw_only=True)
class NFMConfig(MLPSizes):
    power: float = 2.0
    signed: bool = False
    kind: str = "sum"


class NFM(Backbone):
    """Pairs of fields, summed."""

    Config: ClassVar[type] = NFMConfig

    def __init__(self, num_fields: int, dim: int, config: NFMConfig) -> None:
        super().__init__()
        self.power = config.power
        self.mlp = MLP(dim, config.hidden, config.dropout)
        self.out_dim = config.hidden[-1]

    def forward(self, x_BFD):
        return self.mlp((x_BFD.sum(dim=1) ** self.power - (x_BFD ** self.power).sum(dim=1)) / 2)

    def flops(self) -> int:
        return linear_flops(self.mlp)


class lower(NFM): ...


class Plain: ...


class Unfinished(Backbone):
    def forward(self, x_BFD): ...


class Bare(NFM):
    Config: ClassVar[Any] = None


@dataclass
class Thawed:
    hidden: int = 1

    def ladder(self, k, along):
        return self


class Thaws(NFM):
    Config = Thawed


@dataclass(frozen=True)
class Rungless:
    hidden: int = 1


class Fixed(NFM):
    Config = Rungless


@dataclass(frozen=True, kw_only=True)
class NeedyConfig(MLPSizes):
    order: int


class Needy(NFM):
    Config = NeedyConfig


@dataclass(frozen=True, kw_only=True)
class TakenConfig(MLPSizes):
    width: int = 3


class Taken(NFM):
    Config = TakenConfig


@dataclass(frozen=True, kw_only=True)
class WrongConfig(MLPSizes):
    def __post_init__(self):
        raise ValueError("never right")


class Wrong(NFM):
    Config = WrongConfig


class DCNv2(NFM): ...
'''

RECIPES = """
import dataclasses
import json

from recsys.members import ModelConfig
from recsys.recipes import synthetic


def tiny():
    return dataclasses.replace(synthetic(), seed=7, members=("own.nets:NFM", "dcnv2"))


def with_argument(rows):
    return tiny()


def forgot():
    tiny()


def divides():
    return 1 / 0


def reads():
    return json.loads("{")


def wrong_model():
    return dataclasses.replace(synthetic(), model=ModelConfig(embedding_dropout=2))


SOME = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A folder to work in, with a package `own`; writes another file of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own").mkdir()

    def write(name: str, text: str) -> None:
        (tmp_path / "own" / name).write_text(text)
        for module in [module for module in sys.modules if module.split(".")[0] in ("own", "nets")]:
            del sys.modules[module]
        importlib.invalidate_caches()

    write("nets.py", NETS)
    write("recipes.py", RECIPES)
    return write


def test_a_class_is_a_member_like_any_other() -> None:
    texts = ["own.nets:NFM*2", "own.nets:NFM:name=wide,width=4,power=3.0,signed=true,kind=max,dense_lr=3e-4", "dcnv2"]
    first, second, wide, other = parse_members([*texts[:2], "own.nets:lower"], 5)
    assert [member.name for member in (first, second, wide, other)] == ["nfm", "nfm_2", "wide", "lower"]
    assert [member.seed for member in (first, second, wide, other)] == [5, 1005, 2005, 5]
    assert first.backbone == "own.nets:NFM"
    assert wide.sizes == type(first.sizes)(hidden=first.sizes.hidden, power=3.0, signed=True, kind="max").ladder(
        4, "width"
    )
    described = describe_member(wide, ModelConfig(), BackboneConfigs())
    assert parse_members([described], 0) == (wide,)


def test_a_module_that_is_no_package_is_told_by_the_capital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path / "own")
    (member,) = parse_members(["nets:NFM:hidden=32"], 0)
    assert (member.name, member.sizes.hidden) == ("nfm", (32,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.nets:NFM", r"^member 'nowhere.nets:NFM': no module 'nowhere' in /\S+, and none is installed$"),
        ("own.nest:NFM", r"no module 'own.nest' in "),
        ("own.nets:NFN", r"^member 'own.nets:NFN': own/nets.py has no 'NFN'; did you mean NFM"),
        ("own/nets.py:NFM", r"not as a file: write own\.nets:NFM$"),
        ("own..nets:NFM", r"'own..nets:NFM' is not package.module:name$"),
        ("own.nets:Plain", r"own.nets:Plain is no Backbone; derive the class from recsys.backbones.base.Backbone$"),
        ("own.nets:linear_flops", r"own.nets:linear_flops is no Backbone"),
        ("own.nets:Unfinished", r"own/nets.py:\d+: Unfinished lacks flops$"),
        ("own.nets:Bare", r"own/nets.py:\d+: Bare has no Config; give it `Config: ClassVar\[type\] =`"),
        ("own.nets:Thaws", r"own/nets.py:\d+: Thawed must be a frozen dataclass with a method ladder"),
        ("own.nets:Fixed", r"own/nets.py:\d+: Rungless must be a frozen dataclass with a method ladder"),
        ("own.nets:Needy", r"own/nets.py:\d+: NeedyConfig.order needs a default$"),
        ("own.nets:Wrong", r"own/nets.py:\d+: ValueError: never right$"),
        ("own.nets:Taken", r"TakenConfig has a field 'width', which is an option of every member"),
        ("own.nets:NFM:powr=3", r"^member 'own.nets:NFM:powr=3': 'powr=3' is no option KEY=VALUE; did you mean power"),
        ("own.nets:NFM:power=x", r"power: expected float, found 'x'"),
        ("own.broken:NFM", r"^member 'own.broken:NFM': own/broken.py:2: .*never closed$"),
        ("own.needs:NFM", r"own/needs.py:1: ModuleNotFoundError: No module named 'nothing_such'$"),
        ("nets:nfm", r"^unknown backbone 'nets'; .*\(or package.module:Class\)$"),
    ],
)
def test_classes_that_are_no_backbones(text: str, message: str, own: Callable[[str, str], None]) -> None:
    own("broken.py", "x = 1\ny = (\n")
    own("needs.py", "import nothing_such\n")
    with pytest.raises(InputError, match=message) as caught:
        parse_members([text], 0)
    assert "\n" not in str(caught.value)


def test_a_class_named_as_one_of_ours_needs_a_name_beside_it() -> None:
    with pytest.raises(InputError, match="'dcnv2' cannot be: 2 members have it; give one another, as in dcnv2:name="):
        parse_members(["dcnv2", "own.nets:DCNv2"], 0)
    assert len(parse_members(["dcnv2", "own.nets:DCNv2:name=mine"], 0)) == 2


def test_a_run_of_it_evaluates_predicts_merges_and_goes_on(prepared: Path, tmp_path: Path) -> None:
    options = ["--data", str(prepared), "--train.batch-size", "128", "--model.embedding-dim", "8"]
    member = "own.nets:NFM:hidden=8,power=3.0"
    train = ["train", "synthetic", *options, "--members", member, "--out"]
    assert main([*train, "a", "--train.num-steps", "4"]) == 0
    _forget()
    assert main([*train, "a", "--train.num-steps", "6", "--resume", "auto"]) == 0
    assert main([*train, "b", "--train.num-steps", "4", "--seed", "1"]) == 0
    for command in (["merge", "a", "b", "--out", "ab"], ["evaluate", "ab"], ["predict", "ab", "--out", "p.parquet"]):
        _forget()
        assert main(command) == 0, command
    assert main([*train[:-1], "--out", "c", "--warm-start.path", "a", "--train.num-steps", "1"]) == 0
    config = json.loads(Path("ab/config.json").read_text())
    assert [text.split(":hidden")[0].split(",hidden")[0] for text in config["members"]] == [
        "own.nets:NFM:name=nfm,seed=0",
        "own.nets:NFM:name=nfm_2,seed=1",
    ]


def _forget() -> None:
    """As another process would begin."""
    for module in [module for module in sys.modules if module.split(".")[0] == "own"]:
        del sys.modules[module]
    sys.path.remove(str(Path.cwd()))


def test_a_recipe_of_ones_own() -> None:
    config = find_recipe("own.recipes:tiny")
    assert (config.seed, config.data) == (7, synthetic().data)
    assert [spec.name for spec in config.specs()] == ["nfm", "dcnv2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own.recipes:with_argument", r"own/recipes.py:13: missing a required argument: 'rows'; a recipe is called"),
        ("own.recipes:forgot", r"own/recipes.py:17: returns NoneType instead of TrainConfig"),
        ("own.recipes:divides", r"own/recipes.py:22: ZeroDivisionError: division by zero"),
        ("own.recipes:reads", r"own/recipes.py:26: JSONDecodeError: Expecting property name"),
        ("own.recipes:wrong_model", r"own/recipes.py:30: ValueError: embedding_dropout 2 must lie in \[0, 1\)"),
        ("own.recipes:SOME", r"is int, not a function that returns a TrainConfig"),
        ("own.recipes:tni", r"own/recipes.py has no 'tni'; did you mean tiny"),
        ("own/recipes.py:tiny", r"write own.recipes:tiny"),
        ("./own/recipes:tiny", r"write own.recipes:tiny"),
        ("own.broken:tiny", r"own/broken.py:1: expected ':'"),
        ("nowhere:tiny", r"no module 'nowhere' in "),
        ("own.recipes:", r"'own.recipes:' is not package.module:name"),
    ],
)
def test_recipes_that_cannot_be(
    name: str, message: str, own: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    own("broken.py", "def tiny() return\n")
    with pytest.raises(InputError, match=rf"^recipe '{name}'.* {message}"):
        find_recipe(name)
    assert main(["train", name]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
