"""Members as texts: names, seeds, options, and what is wrong with them."""

import dataclasses

import pytest

from recsys.backbones import BACKBONES
from recsys.backbones.dcnv2 import DCNv2Config
from recsys.backbones.wukong import WukongConfig
from recsys.config import InputError
from recsys.members import BackboneConfigs, ModelConfig, describe_member, parse_members, renamed


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["wukong"], [("wukong", "wukong", 7)]),
        (["dcnv2*2"], [("dcnv2", "dcnv2", 7), ("dcnv2_2", "dcnv2", 1007)]),
        (["dcnv2", "dcnv2*2"], [("dcnv2", "dcnv2", 7), ("dcnv2_2", "dcnv2", 1007), ("dcnv2_3", "dcnv2", 2007)]),
        (["dcnv2", "wukong", "dcnv2"], [("dcnv2", "dcnv2", 7), ("wukong", "wukong", 7), ("dcnv2_2", "dcnv2", 1007)]),
    ],
)
def test_names_and_seeds_count_up_within_a_backbone(texts: list[str], expected: list[tuple[str, str, int]]) -> None:
    found = [(spec.name, spec.backbone, spec.seed) for spec in parse_members(texts, seed=7)]
    assert found == expected


def test_jobs_of_other_seeds_have_no_member_in_common() -> None:
    seeds = [spec.seed for seed in range(5) for spec in parse_members(["dcnv2*5"], seed)]
    assert len(set(seeds)) == 25


def test_a_member_is_the_same_whoever_rides_along() -> None:
    alone = parse_members(["dcnv2*2"], seed=7)
    for others in (["wukong", "dcnv2*2"], ["dcnv2", "rankmixer*3", "dcnv2"], ["dcnv2*5"]):
        together = parse_members(others, seed=7)
        assert all(spec in together for spec in alone)
        assert len(together) > 2


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["dcnv3"], "unknown backbone 'dcnv3'; did you mean dcnv2"),
        (["wukong", "xyz*2"], "unknown backbone 'xyz'; known are .*, wukong"),
        (["dcnv2*0"], r"member 'dcnv2\*0' is neither NAME nor NAME\*COUNT"),
        (["dcnv2*00", "wukong"], r"member 'dcnv2\*00' is neither"),
        (["dcnv2*"], "is neither"),
        (["dcnv2*-1"], "is neither"),
        (["dcnv2,wukong"], "is neither"),
        ([""], "is neither"),
        (["dcnv2:width"], "'width' is no option KEY=VALUE"),
        (["dcnv2:heigth=2"], "'heigth=2' is no option KEY=VALUE"),
        (["dcnv2:num_fm=2"], "'num_fm=2' is no option KEY=VALUE"),
        (["dcnv2:tables=shared"], "the whole job has one tables"),
        (["dcnv2:precision=bf16"], "the whole job has one precision"),
        (["dcnv2:dropout=2"], "member 'dcnv2:dropout=2': dropout is 2"),
        (["dcnv2:hidden=256-x"], r"hidden\[1\]: expected int, found 'x'"),
        (["dcnv2:seed=x"], "seed: expected int, found 'x'"),
        (["dcnv2:dense_lr=-1"], "dense_lr -1.0 must be a finite number, and not negative"),
        (["dcnv2:width=0.5"], "width 0.5 must lie between 1 and 10,000"),
        (["dcnv2:embedding_dim=10"], "must be a multiple of 4; 12 is"),
        (["rankmixer:token_dim=60"], "must be a multiple of num_tokens = 8, give 56 or 64"),
        (["dcnv2:name=a", "wukong:name=a"], "member name 'a' cannot be: 2 members have it; give one another, as in"),
        (["dcnv2:name=merged"], "member name 'merged' cannot be: predictions have merged, shared, row, label, weight"),
        (["dcnv2:name=label"], "member name 'label' cannot be: predictions have .* beside the members$"),
        (["dcnv2:name=keys"], "member name 'keys' cannot be: it is an attribute of torch's modules$"),
        (["dcnv2:width=Infinity"], "width inf must lie between 1"),
        (["dcnv2:init_scale=NaN"], "init_scale: nan is no number"),
        (["dcnv2:hidden=256,128"], "widths of several layers are written 256-128"),
        (["dcnv2:rank=x"], "rank: expected int, found 'x', or none"),
        (["dcnv2:seed=1000", "dcnv2*2"], "members dcnv2 and dcnv2_3 are the same: backbone dcnv2, seed 1000"),
        (["dcnv2:name=a.b"], "member name 'a.b' cannot be: a name is a word of letters, digits"),
        ([], "no member named; known backbones are .*dcnv2"),
    ],
)
def test_texts_that_are_no_members(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_members(texts, seed=0)


def test_options_change_one_member() -> None:
    model = ModelConfig(embedding_dim=8, head_hidden=(32,))
    backbones = BackboneConfigs(dcnv2=DCNv2Config(hidden=(64, 32), rank=4))
    text = "dcnv2*2:name=own,seed=5,dense_lr=3e-4,table_lr=0.2,embedding_dim=32,head_hidden=16-8,hidden=100,rank=none"
    first, second, plain = parse_members([text, "dcnv2"], 7, model, backbones)
    assert (first.name, first.seed, first.dense_lr, first.table_lr) == ("own", 5, 3e-4, 0.2)
    assert first.model == ModelConfig(embedding_dim=32, head_hidden=(16, 8))
    assert first.sizes == DCNv2Config(hidden=(100,))
    assert (second.name, second.seed, second.sizes) == ("own_2", 1005, first.sizes)
    assert (plain.name, plain.seed) == ("dcnv2", 7)
    assert (plain.model, plain.sizes) == (model, backbones.dcnv2)
    (linear_head,) = parse_members(["dcnv2:head_hidden="], 7, model, backbones)
    assert linear_head.model.head_hidden == ()


def test_rungs_of_the_ladder() -> None:
    wide, deep = parse_members(["dcnv2:width=4", "wukong:depth=2"], 0)
    assert wide.sizes == DCNv2Config(hidden=(512, 256))
    assert deep.sizes == WukongConfig(num_layers=4)


def test_members_that_share_tables_have_one_width() -> None:
    shared = ModelConfig(tables="shared")
    with pytest.raises(InputError, match="members that share tables need one embedding_dim, not 16, 32"):
        parse_members(["dcnv2", "wukong:embedding_dim=32"], 0, shared)
    with pytest.raises(InputError, match=r"members that share tables need one init_scale, not 0\.01, 0\.2"):
        parse_members(["dcnv2", "wukong:init_scale=0.2"], 0, shared)
    with pytest.raises(InputError, match=r"member wukong: tables are shared, so --optimizer\.table-lr is all members'"):
        parse_members(["dcnv2", "wukong:table_lr=0.2"], 0, shared)


def test_no_option_means_two_things() -> None:
    of_members = {"name", "seed", "dense_lr", "table_lr", "width", "depth"}
    of_model = {field.name for field in dataclasses.fields(ModelConfig)}
    assert not of_members & of_model
    for name, kind in BACKBONES.items():
        assert not {field.name for field in dataclasses.fields(kind.Config)} & (of_members | of_model), name


@pytest.mark.parametrize("name", BACKBONES)
def test_every_size_of_every_backbone_is_written_and_read_back(name: str) -> None:
    (usual,) = parse_members([name], 0)
    (bigger,) = parse_members([f"{name}:width=3,depth=2"], 0)
    assert bigger.sizes != usual.sizes
    text = describe_member(bigger, ModelConfig(), BackboneConfigs())
    assert parse_members([text], 0) == (bigger,)


def test_optional_widths_are_read() -> None:
    (member,) = parse_members(["autoint:hidden=64-32"], 0)
    assert member.sizes.hidden == (64, 32)


@pytest.mark.parametrize(
    "text",
    [
        "dcnv2",
        "dcnv2*3",
        "dcnv2:seed=9,dense_lr=3e-4,hidden=512-256,rank=8,structure=stacked,dropout=0.1",
        "wukong:name=w,depth=3,embedding_dim=32,head_hidden=64,init_scale=0.2",
    ],
)
def test_a_member_is_read_back_from_its_description(text: str) -> None:
    specs = parse_members([text], 7)
    usual = ModelConfig(head_hidden=(8,)), BackboneConfigs(dcnv2=DCNv2Config(rank=3))
    assert parse_members([describe_member(spec, *usual) for spec in specs], 0, *usual) == specs


def test_a_description_cannot_change_what_is_the_jobs() -> None:
    (spec,) = parse_members(["dcnv2"], 0, ModelConfig(precision="bf16"))
    with pytest.raises(InputError, match="member dcnv2 has precision bf16, where the job has fp32"):
        describe_member(spec, ModelConfig(), BackboneConfigs())


def test_renamed_members_number_up_past_what_is_taken() -> None:
    specs = parse_members(["dcnv2*2", "wukong"], 0)
    taken = {"dcnv2": 0, "dcnv2_2": 0}
    assert [spec.name for spec in renamed(specs, taken)] == ["dcnv2_3", "dcnv2_4", "wukong"]
