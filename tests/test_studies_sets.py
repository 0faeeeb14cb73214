"""Which members are merged together: sets of one source and size share none."""

from itertools import combinations

import pytest

from recsys.studies.config import MergeStudyConfig
from recsys.studies.sets import all_sets, chunks, pool_names, sets_of_backbones

CONFIGS = [
    MergeStudyConfig(out="unused"),  # type: ignore[arg-type]
    MergeStudyConfig(
        out="unused",  # type: ignore[arg-type]
        backbones=("dcnv2", "fnn", "wukong"),
        seeds=3,
        more_seeds_of=("dcnv2", "wukong"),
        more_seeds=5,
        sizes=(1, 2, 3, 5),
        ablation_sets=0,
        rivals=(2,),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_sets_of_one_source_and_size_are_disjoint_and_of_the_pool(config: MergeStudyConfig) -> None:
    pool = pool_names(config)
    assert len(pool) == len(set(pool)) == sum(map(config.num_seeds, config.backbones))
    for (_, size), sets in all_sets(config).items():
        members = [name for group in sets for name in group]
        assert len(members) == len(set(members))
        assert set(members) <= set(pool)
        assert {len(group) for group in sets} == {size}


@pytest.mark.parametrize("config", CONFIGS)
def test_sets_are_of_their_source(config: MergeStudyConfig) -> None:
    for (source, _), sets in all_sets(config).items():
        for group in sets:
            backbones, seeds = zip(*(name.rsplit("_s", 1) for name in group), strict=True)
            if source.startswith("seeds"):
                assert len(set(backbones)) == 1
                assert source in ("seeds", f"seeds of {backbones[0]}")
            if source == "backbones":
                assert len(set(backbones)) == len(group)
                assert len(set(seeds)) == 1


def test_the_default_study_has_so_many_sets() -> None:
    counts = {key: len(sets) for key, sets in all_sets(CONFIGS[0]).items()}
    assert counts["seeds of dcnv2", 4] == 2
    assert counts["seeds of dcnv2", 8] == 1
    assert counts["seeds of fnn", 4] == 1
    assert ("seeds of fnn", 8) not in counts
    assert counts["seeds", 2] == counts["backbones", 2] == 16
    assert counts["backbones", 8] == 4
    assert counts["mixed", 8] == 4  # of 36 members


def test_every_backbone_has_as_many_sets_among_seeds() -> None:
    groups = all_sets(CONFIGS[1])["seeds", 2]
    assert sorted(group[0].split("_")[0] for group in groups) == ["dcnv2", "fnn", "wukong"]


def test_partners_vary_with_the_seed() -> None:
    pairs = [frozenset(name.split("_")[0] for name in group) for group in sets_of_backbones(CONFIGS[0], 4)]
    assert len(set(pairs)) == len(pairs)


def test_what_is_left_over_is_in_no_set() -> None:
    assert chunks(list("abcde"), 2) == [("a", "b"), ("c", "d")]
    assert chunks(list("abc"), 4) == []
    assert not any(set(a) & set(b) for a, b in combinations(chunks(list("abcdefgh"), 3), 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbones": ("dcn2",)}, "unknown backbone 'dcn2'; did you mean dcnv2"),
        ({"backbones": ("fnn", "fnn")}, "backbone fnn stands twice"),
        ({"backbones": ()}, "backbones is empty"),
        ({"backbones": ("fnn",)}, "more_seeds_of 'dcnv2' is none of the backbones"),
        ({"seeds": 0}, "seeds 0 must be at least 1"),
        ({"rival_seeds": 0}, "rival_seeds 0 must be at least 1"),
        ({"seeds": 9}, "more_seeds 8 must not be below seeds 9"),
        ({"sizes": (1, 37)}, r"sizes \(1, 37\) must lie between 1 and the pool's 36 members"),
        ({"sizes": ()}, "must lie between"),
        ({"sizes": (2, 2)}, "names one twice"),
        ({"rivals": (9,)}, "rivals 9 must lie between 2 and the 8 seeds of dcnv2"),
        ({"rivals": (1,)}, "rivals 1 must lie between 2"),
        ({"more_seeds_of": ()}, "more_seeds_of is empty; rivals and ablations"),
        ({"rival_kinds": ()}, "rival_kinds is empty"),
        ({"rival_kinds": ("wider", "wider")}, "names one twice"),
        ({"ablation_sets": 3}, "raise more_seeds from 8 to 12"),
        ({"ablation_members": 1}, "ablation_members at least 2"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MergeStudyConfig(**{"out": "unused", **changes})
