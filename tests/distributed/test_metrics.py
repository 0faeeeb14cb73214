"""Metrics over the ranks of a job: those of one process, whoever has which rows, in bounded memory."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score, roc_auc_score

from recsys.distributed import World, process_group
from recsys.metrics import ranked
from recsys.metrics.click import ClickMetrics, ClickScores, click_metrics
from recsys.metrics.groups import GroupedScores
from recsys.tasks.click import Outputs, cross_entropy
from recsys.training.metrics import KEPT_STEPS, TrainingMetrics
from tests.distributed.jobs import on_ranks

NUM_ROWS = 20_000
MEMBERS = ("a", "b")
NUM_STEPS, BATCH = 2 * KEPT_STEPS + 5, 96
CUT = KEPT_STEPS + 3


def rows(decimals: int) -> tuple[np.ndarray, ...]:
    """Logits float32, labels, weights of which some are 0, and ids of groups; the fewer decimals, the more ties."""
    rng = np.random.default_rng(decimals)
    logits = rng.normal(-1, 1, NUM_ROWS).round(decimals).astype(np.float32)
    labels = (rng.random(NUM_ROWS) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    weights = (rng.exponential(size=NUM_ROWS) * (rng.random(NUM_ROWS) < 0.9)).astype(np.float32)
    return logits, labels, weights, rng.integers(50, size=NUM_ROWS)


def steps() -> list[Outputs]:
    """Outputs of global batches."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(NUM_STEPS):
        logits_BM = torch.randn(BATCH, len(MEMBERS), generator=generator) - 1
        labels_B = (torch.rand(BATCH, generator=generator) < logits_BM[:, 0].sigmoid()).float()
        weights_B = torch.rand(BATCH, generator=generator)
        found.append(Outputs(cross_entropy(logits_BM, labels_B, weights_B), logits_BM, labels_B, weights_B))
    return found


def share(outputs: Outputs, world: World) -> Outputs:
    """What a rank has of a global batch."""
    part = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    logits_BM, labels_B, weights_B = outputs.logits_BM[part], outputs.labels_B[part], outputs.weights_B[part]
    return Outputs(cross_entropy(logits_BM, labels_B, weights_B), logits_BM, labels_B, weights_B)


def _measure(world: World, folder: Path) -> None:
    ranked.CHUNK_ROWS, ranked.BUCKET_ROWS, ranked.SAMPLES = 1_000, 700, 60
    found = {}
    for decimals in (0, 1, 6):
        logits, labels, weights, ids = rows(decimals)
        # Ranks have unequal shares, and the last of several none at all.
        mine = np.arange(NUM_ROWS) % 7 % max(world.size - 1, 1) == world.rank
        scores = ClickScores().add(logits[mine], labels[mine], weights[mine])
        grouped = GroupedScores().add(ids[mine], logits[mine], labels[mine], weights[mine])
        everyone = [dataclasses.asdict(scores.metrics(dist.group.WORLD)), grouped.metrics(dist.group.WORLD).gauc]
        found[decimals] = everyone
    torch.save(found, folder / f"{world.size}-{world.rank}.pt")
    _train(world, folder)


def _train(world: World, folder: Path) -> None:
    """Training metrics of a run, which is saved in the middle of a window on these ranks."""
    metrics, before = TrainingMetrics(MEMBERS, world.device), []
    for number, outputs in enumerate(steps()):
        if number == CUT:
            before.append(metrics.window(world))
        if number == CUT + 2:
            torch.save(metrics.state(world), folder / f"state-{world.size}-{world.rank}.pt")
        metrics.update(share(outputs, world))
    torch.save(
        [*before, metrics.lifetime(world), metrics.window(world)], folder / f"train-{world.size}-{world.rank}.pt"
    )


def _measure_and_go_on(world: World, folder: Path) -> None:
    """Also go on from the state of four ranks."""
    _measure(world, folder)
    metrics = TrainingMetrics(MEMBERS, world.device)
    metrics.load_state(torch.load(folder / "state-4-0.pt"))
    for outputs in steps()[CUT + 2 :]:
        metrics.update(share(outputs, world))
    torch.save([metrics.lifetime(world), metrics.window(world)], folder / f"resumed-{world.size}-{world.rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 1, 2 and 4 ranks found."""
    folder = tmp_path_factory.mktemp("metrics")
    with pytest.MonkeyPatch.context() as patch, process_group() as world:
        for name in ("CHUNK_ROWS", "BUCKET_ROWS", "SAMPLES"):
            patch.setattr(ranked, name, getattr(ranked, name))  # back when done
        torch.set_num_threads(1)
        _measure(world, folder)
    on_ranks(4, _measure, folder)
    on_ranks(2, _measure_and_go_on, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_metrics_over_ranks_are_scikit_learns(folder: Path, world_size: int, decimals: int) -> None:
    logits, labels, weights, _ = rows(decimals)
    values, gauc = torch.load(folder / f"{world_size}-0.pt", weights_only=False)[decimals]
    wide = weights.astype(np.float64)
    assert values["auc"] == pytest.approx(roc_auc_score(labels, logits, sample_weight=wide), abs=1e-9)
    assert values["auprc"] == pytest.approx(average_precision_score(labels, logits, sample_weight=wide), abs=1e-9)
    expected = dataclasses.asdict(click_metrics(labels, 1 / (1 + np.exp(-logits.astype(np.float64))), weights))
    for name, value in expected.items():
        if value is not None:
            np.testing.assert_allclose(np.array(values[name]), np.array(value), rtol=1e-9, err_msg=name)
    ids = rows(decimals)[3]
    assert gauc == pytest.approx(GroupedScores().add(ids, logits, labels, weights).metrics().gauc, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_find_the_same(folder: Path, world_size: int) -> None:
    found = [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=False) for rank in range(world_size)]
    assert all(other == found[0] for other in found)


def expected_training(outputs: list[Outputs], member: int) -> ClickMetrics:
    logits, labels, weights = (
        torch.cat([getattr(each, name) for each in outputs]).double().numpy()
        for name in ("logits_BM", "labels_B", "weights_B")
    )
    return click_metrics(labels, 1 / (1 + np.exp(-logits[:, member])), weights)


def check_training(found: dict[str, dict[str, float]], outputs: list[Outputs]) -> None:
    assert list(found) == list(MEMBERS)
    for member, name in enumerate(MEMBERS):
        exact, values = expected_training(outputs, member), found[name]
        for metric in ("logloss", "ne", "calibration"):
            assert values[metric] == pytest.approx(getattr(exact, metric), rel=1e-6)
        assert abs(values["auc"] - exact.auc) <= values["auc_error"] < 1e-3
        assert values["auc"] == pytest.approx(exact.auc, abs=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_metrics_are_of_the_window_and_of_all_steps(folder: Path, world_size: int) -> None:
    first, lifetime, second = torch.load(folder / f"train-{world_size}-0.pt")
    check_training(first, steps()[:CUT])
    check_training(second, steps()[CUT:])
    check_training(lifetime, steps())


@pytest.mark.slow
def test_training_metrics_go_on_exactly_on_other_ranks(folder: Path) -> None:
    for whole, resumed in zip(
        torch.load(folder / "train-4-0.pt")[1:], torch.load(folder / "resumed-2-1.pt"), strict=True
    ):
        for name in MEMBERS:
            assert resumed[name] == pytest.approx(whole[name], rel=1e-6)


def test_a_resumed_run_goes_on_bit_for_bit_on_as_many_ranks(tmp_path: Path) -> None:
    with process_group() as world:
        whole, first, second = (TrainingMetrics(MEMBERS, world.device) for _ in range(3))
        for number, outputs in enumerate(steps()):
            if number == 5:
                assert first.window(world) == whole.window(world)
            whole.update(outputs)
            (first if number < CUT else second).update(outputs)
            if number == CUT - 1:
                whole.state(world)
                second.load_state(first.state(world))
        assert second.lifetime(world) == whole.lifetime(world)
        check_training(whole.lifetime(world), steps())
        assert second.window(world) == whole.window(world)
        assert whole.window(world) == {}


def test_steps_without_a_finite_loss_count_nowhere() -> None:
    with process_group() as world:
        metrics = TrainingMetrics(MEMBERS, world.device)
        for number, outputs in enumerate(steps()):
            metrics.update(outputs)
            if number % 7 == 0:
                logits_BM = outputs.logits_BM.clone()
                logits_BM[3, 1] = torch.nan
                losses_M = cross_entropy(logits_BM, outputs.labels_B, outputs.weights_B)
                metrics.update(dataclasses.replace(outputs, logits_BM=logits_BM, losses_M=losses_M))
        check_training(metrics.lifetime(world), steps())


def _keep_many(world: World, num_rows: int, folder: Path) -> None:
    rng = np.random.default_rng(world.rank)
    few = np.arange(4, dtype=np.float32)
    ClickScores().add(few, few % 2, np.ones(4, np.float32)).metrics(dist.group.WORLD)
    process = psutil.Process()
    before, highest = process.memory_info().rss, 0
    scores = ClickScores()
    for _ in range(0, num_rows, 50_000):
        logits = rng.normal(size=50_000).astype(np.float32)
        scores.add(logits, rng.random(50_000) < 0.2, np.ones(50_000, np.float32))
        highest = max(highest, process.memory_info().rss)
    buckets = ranked.RankedRows.buckets

    def watched(kept: ranked.RankedRows, group: dist.ProcessGroup | None = None) -> Iterator[ranked.Bucket]:
        nonlocal highest
        for bucket in buckets(kept, group):
            highest = max(highest, process.memory_info().rss)
            yield bucket

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranked.RankedRows, "buckets", watched)
        scores.metrics(dist.group.WORLD)
    (folder / f"{world.rank}.json").write_text(json.dumps(highest - before))


def test_memory_is_that_of_the_rows_and_a_few_buckets(tmp_path: Path) -> None:
    # 2 GiB for 100 million rows are 21 bytes a row; what does not grow with rows comes on top of few.
    num_rows = 4_000_000
    on_ranks(1, _keep_many, num_rows, tmp_path)
    assert json.loads((tmp_path / "0.json").read_text()) < 21 * num_rows + 100 * 2**20
