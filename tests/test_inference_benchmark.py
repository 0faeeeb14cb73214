"""The benchmark of predictions calls what `recsys predict` calls, and runs in miniature; no timing is asserted."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inference
import pytest
import torch
from inference import Config, batches, main, predictor, timed

from recsys.backbones import BACKBONES
from recsys.distributed import process_group
from recsys.members import parse_members
from recsys.merge.rules import mean_logit
from recsys.model import Member
from recsys.training.workload import dense_flops
from roofline import member_products

CPU = torch.device("cpu")
TINY: dict[str, Any] = {"sizes": "default", "fields": 6, "rows_per_table": 20, "dim": 8}
LIBRARIES = pytest.mark.filterwarnings("ignore")  # of what others tell when they are used as they come


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)  # a job takes all cores


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_floor_has_all_products_of_the_forward_pass(backbone: str) -> None:
    schema = Config(**TINY).schema()
    (spec,) = parse_members((backbone,), 0, inference.ModelConfig(embedding_dim=8))
    products = member_products(spec, schema, 16, CPU, backward=False)
    assert sum(product.flops for product in products) == 16 * dense_flops([Member(spec, schema)])


@LIBRARIES
def test_predictions_are_those_of_members_merged() -> None:
    config = Config(**TINY, batch_sizes=(32,))
    schema = config.schema()
    source = batches(schema, 32)
    first, second = itertools.islice(source, 2)
    assert not torch.equal(first.sparse.values(), second.sparse.values())
    assert first.sparse.values().max() < 20
    made: list[torch.nn.Module] = []

    def kept(*arguments: Any) -> Any:
        found = shard(*arguments)
        made.append(found.task)
        return found

    shard = inference.shard
    with process_group() as world, pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "shard", kept)
        exact = predictor(config.setting(2, "fp32", 32), schema, world)(first)
        rounded = predictor(config.setting(2, "bf16", 32), schema, world)(first)
        with torch.no_grad():
            logits_BM = made[0](first)[1].logits_BM
    assert not any(task.training for task in made)
    dense = [value for name, value in made[1].named_parameters() if ".members." in name]
    assert {value.dtype for value in dense if value.dim() > 1} == {torch.bfloat16}
    assert not exact.requires_grad
    assert logits_BM.shape == (32, 2)
    assert logits_BM.std() > 0
    torch.testing.assert_close(exact, mean_logit(logits_BM.double()))
    torch.testing.assert_close(exact, rounded, rtol=0, atol=0.02)
    assert not torch.equal(exact, rounded)


def test_calls_take_turns_and_only_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    told: list[str] = []

    def case(name: str, seconds: float):
        def make():
            nonlocal now
            now += 100  # to make a call ready
            return call

        def call() -> None:
            nonlocal now
            now += seconds
            told.append(name)

        return make

    monkeypatch.setattr(inference.time, "perf_counter", lambda: now)
    found = timed({"a": case("a", 0.25), "b": case("b", 1.0)}, Config(calls=24, seconds=16.0, turns=2))
    assert found == {"a": [[0.25] * 12] * 2, "b": [[1.0] * 8] * 2}
    assert told == ["a"] * 4 + ["b"] * 4 + 2 * (["a"] * 15 + ["b"] * 11)


@LIBRARIES
def test_latencies_and_shares_are_reported_and_drawn(tmp_path: Path) -> None:
    options: dict[str, Any] = {"calls": 6, "seconds": 0.01, "turns": 2}
    files: dict[str, Any] = {"json": tmp_path / "out.json", "plot": tmp_path / "latency.png"}
    main(Config(**TINY, **options, **files, backbone="fnn", members=(1, 2), batch_sizes=(1, 8)))
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    cases = [tuple(line["config"][key] for key in ("batch_size", "members", "precision")) for line in lines]
    assert cases == list(itertools.product((1, 8), (1, 2), ("fp32", "bf16")))
    for line in lines:
        assert {"commit", "machine", "versions", "command", "date", "name"} <= line.keys()
        config, metrics = line["config"], line["metrics"]
        more = {"ratio_to_fp32"} if config["precision"] == "bf16" else set()
        more |= {"ratio_to_members_1"} if config["members"] == 2 else set()
        assert line["ratios"].keys() == {"floor_share"} | more
        ms = metrics["ms"]
        assert 0 < ms["p50"] <= ms["p90"] <= ms["p99"] <= ms["high"]
        assert metrics["rows_per_s"]["low"] >= 0.999 * config["batch_size"] / (1e-3 * ms["high"])
        assert metrics["calls"] == 6
    flops = {(line["config"]["batch_size"], line["config"]["members"]): line["metrics"]["flops"] for line in lines}
    assert flops[8, 2] == 2 * flops[8, 1] == 16 * flops[1, 1]
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"batch_sizes": ()}, "batch_sizes is empty"),
        ({"batch_sizes": (0,)}, "batch_size 0 must be at least 1"),
        ({"members": (0,)}, "members 0 must be at least 1"),
        ({"calls": 0}, "calls 0"),
        ({"seconds": 0.0}, "seconds 0.0"),
        ({"backbone": "dcnv3"}, "unknown backbone 'dcnv3'"),
    ],
)
def test_options_that_cannot_be_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**values)
