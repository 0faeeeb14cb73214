"""The recipe of MLPerf's DLRM-DCNv2: the model that TorchRec's reference has, and a run in miniature."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.models.dlrm import DLRM_DCN
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from recsys.cli import main
from recsys.data.prepare import prepare
from recsys.data.settings import PrepareConfig
from recsys.model import Member
from recsys.recipes.mlperf import mlperf_dlrm_dcnv2, mlperf_schema
from recsys.training.workload import ids_a_row

DIM, NUM_FIELDS = 128, 26


def reference() -> DLRM_DCN:
    """What the benchmark's reference makes of its command line, over tables of one row."""
    tables = [
        EmbeddingBagConfig(name=f"t{index}", embedding_dim=DIM, num_embeddings=1, feature_names=[f"C{index}"])
        for index in range(NUM_FIELDS)
    ]
    return DLRM_DCN(
        EmbeddingBagCollection(tables=tables),
        dense_in_features=13,
        dense_arch_layer_sizes=[512, 256, 128],
        over_arch_layer_sizes=[1024, 1024, 512, 256, 1],
        dcn_num_layers=3,
        dcn_low_rank_dim=512,
    )


def linears(*modules: nn.Module) -> list[nn.Linear]:
    return [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


@torch.no_grad()
def test_the_dense_part_is_that_of_the_reference() -> None:
    (spec,) = mlperf_dlrm_dcnv2().specs()
    ours: Any = Member(spec, mlperf_schema())
    theirs: Any = reference()
    dense = [param for name, param in theirs.named_parameters() if "sparse_arch" not in name]
    assert sum(param.numel() for param in ours.parameters()) == sum(param.numel() for param in dense)

    # Our last field, which dense columns make, is their first.
    order = torch.arange((NUM_FIELDS + 1) * DIM).roll(DIM)
    crossnet = theirs.inter_arch.crossnet
    for index, (v, u) in enumerate(ours.backbone.cross):
        u.bias.normal_()  # it starts at 0, as all do
        crossnet.V_kernels[index].copy_(v.weight[:, order])
        crossnet.W_kernels[index].copy_(u.weight[order])
        crossnet.bias[index].copy_(u.bias[order])
    copies = zip(linears(theirs.dense_arch, theirs.over_arch), linears(*parts(ours)), strict=True)
    for target, layer in copies:
        layer.bias.normal_()
        target.load_state_dict(layer.state_dict())
    first = linears(theirs.over_arch)[0]
    first.weight.copy_(first.weight[:, order])

    random = torch.Generator().manual_seed(0)
    x_BFD = 0.1 * torch.randn(5, NUM_FIELDS, DIM, generator=random)
    dense_BN = torch.rand(5, 13, generator=random)
    # The recipe tells that it lacks this ReLU.
    ours.dense_field.append(nn.ReLU())
    expected_B = theirs.over_arch(theirs.inter_arch(theirs.dense_arch(dense_BN), x_BFD)).squeeze(1)
    torch.testing.assert_close(ours(x_BFD, dense_BN), expected_B, rtol=1e-4, atol=1e-4)


def parts(member: Any) -> tuple[nn.Module, ...]:
    return member.dense_field, member.backbone.mlp, member.head


def test_tables_and_rates_are_those_of_the_rules() -> None:
    config, schema = mlperf_dlrm_dcnv2(), mlperf_schema()
    assert (len(schema.dense), len(schema.sparse)) == (13, NUM_FIELDS)
    assert 4 * DIM * sum(schema.sparse.values()) == 104_542_509_056
    assert sum(ids_a_row(config, schema).values()) == 214
    rates = config.optimizer
    assert (rates.tables, rates.dense, rates.table_lr, rates.dense_lr) == ("adagrad", "adagrad", 0.004, 0.004)
    assert (rates.warmup_steps, rates.decay, rates.weight_decay) == (0, "constant", 0.0)


def test_a_run_in_miniature(synthetic_log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    prepare(PrepareConfig(format="criteo_1tb", paths=(synthetic_log,), out=data, split="random"))
    small = ["--train.batch-size", "64", "--train.num-steps", "24", "--train.log-every", "1"]
    assert main(["train", "mlperf_dlrm_dcnv2", "--data", str(data), "--out", str(out), *small]) == 0
    torch.set_num_threads(1)  # a job takes all cores
    lines = [line.removeprefix(":::MLLOG ") for line in capsys.readouterr().out.splitlines() if ":::MLLOG" in line]
    told = {event["key"]: event["value"] for event in map(json.loads, lines)}
    assert told["submission_benchmark"] == "dlrm_dcnv2"
    assert (told["opt_name"], told["opt_base_learning_rate"], told["global_batch_size"]) == ("adagrad", 0.004, 64)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    losses = [record["loss"]["dlrm_dcn"] for record in trained]
    assert len(losses) == 24
    # They jump at first: without a past, Adagrad moves every weight by the whole rate.
    assert sum(losses[-8:]) / 8 < losses[0]
    assert trained[-1]["ids_per_s"] == pytest.approx(214 * trained[-1]["rows_per_s"])
