"""Members do not know of one another, and each starts and learns as it would alone."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.testing import assert_close

from recsys.backbones import BACKBONES
from recsys.backbones.dcnv2 import DCNv2Config
from recsys.backbones.layers import Dropout
from recsys.backbones.rankmixer import RankMixerConfig
from recsys.backbones.wukong import WukongConfig
from recsys.config import InputError
from recsys.data.batch import Batch
from recsys.data.schema import Schema
from recsys.embeddings.init import init_tables
from recsys.members import BackboneConfigs, MemberSpec, ModelConfig, parse_members
from recsys.merge.rules import mean_logit
from recsys.model import Member, RecModel
from recsys.tasks.click import ClickLoss, ClickTask, cross_entropy
from tests.batches import batch_of

SCHEMA = Schema(name="tiny", dense=("x", "y", "z"), sparse={"c": 11, "a": 5, "b": 7}, labels=("label",))
CONFIG = ModelConfig(embedding_dim=8, embedding_dropout=0.3, dense_hidden=(6,), init_scale=0.5)
BACKBONE_CONFIGS = BackboneConfigs(
    dcnv2=DCNv2Config(num_cross_layers=2, hidden=(16,), dropout=0.2),
    rankmixer=RankMixerConfig(num_tokens=2, token_dim=8, num_layers=1, expansion=2, dropout=0.2),
    wukong=WukongConfig(num_layers=1, num_fm=2, num_linear=2, fm_rank=3, hidden=(16,), dropout=0.2),
)


def members(*texts: str, seed: int = 3, **changes: Any) -> tuple[MemberSpec, ...]:
    return parse_members(texts, seed, dataclasses.replace(CONFIG, **changes), BACKBONE_CONFIGS)


JOB = members("dcnv2*2", "rankmixer", "wukong")
B = 32


def build(specs: Sequence[MemberSpec] = JOB, schema: Schema = SCHEMA) -> RecModel:
    """A model on the CPU, not sharded, its tables filled."""
    model = RecModel(schema, specs)
    model.embedding.to_empty(device="cpu")
    init_tables(model, model.embedding.table_start)
    return model


def member(backbone: str = "dcnv2", seed: int = 0, schema: Schema = SCHEMA) -> Member:
    return Member(members(backbone, seed=seed)[0], schema)


def random_batch(schema: Schema = SCHEMA) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return batch_of(
        torch.randn(B, len(schema.dense), generator=generator),
        {name: torch.randint(num_ids, (B,), generator=generator) for name, num_ids in schema.sparse.items()},
        torch.randint(2, (B,), generator=generator).float(),
    )


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# Tables of all members


def test_tables_take_no_memory_until_they_are_sharded() -> None:
    model = RecModel(SCHEMA, JOB)
    assert {p.device.type for p in model.embedding.parameters()} == {"meta"}
    assert {p.device.type for p in model.members.parameters()} == {"cpu"}


def test_every_table_has_a_seed_of_its_own_that_no_other_member_changes() -> None:
    model = build()
    seeds = {
        key: model.embedding.table_start(key)[0]
        for key in (f"{spec.name}/{name}" for spec in JOB for name in SCHEMA.sparse)
    }
    assert len(set(seeds.values())) == len(seeds) == len(JOB) * len(SCHEMA.sparse)
    for spec in JOB:
        alone = build([spec])
        assert all(
            alone.embedding.table_start(key)[0] == seed
            for key, seed in seeds.items()
            if key.startswith(f"{spec.name}/")
        )


def test_init_tables_fills_all_tables_and_nothing_else() -> None:
    model = build()
    before = parameters(model.members)
    for weight in model.embedding.parameters():
        nn.init.constant_(weight, math.nan)
    init_tables(model, model.embedding.table_start)
    assert all(weight.isfinite().all() and weight.std() > 0.2 for weight in model.embedding.parameters())
    assert torch.equal(parameters(model.members), before)


# One member


def test_initial_layers_depend_on_backbone_and_seed_alone() -> None:
    first = parameters(member("wukong", seed=5))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(parameters(member("wukong", seed=5)), first)
    assert not torch.equal(parameters(member("wukong", seed=6)), first)
    assert torch.equal(torch.get_rng_state(), state), "building a member moves the global stream"
    for spec in JOB:
        together = dict(zip((s.name for s in JOB), build().members, strict=True))[spec.name]
        assert torch.equal(parameters(together), parameters(next(iter(build([spec]).members))))


def dense_weights(one: Member) -> Tensor:
    assert one.dense_field is not None
    return parameters(one.dense_field)


def test_two_backbones_of_one_seed_do_not_start_from_the_same_numbers() -> None:
    for first, second in itertools.combinations(BACKBONES, 2):
        assert not torch.equal(dense_weights(member(first)), dense_weights(member(second)))


def masks(one: Member, *where: int) -> Tensor:
    """What the member drops of its embeddings, and what its backbone's layers do with theirs."""
    one.train()
    one.reseed(*where)
    x_BFD = torch.ones(B, SCHEMA.num_fields, CONFIG.embedding_dim)
    return torch.cat([one.dropout(x_BFD).flatten(), one.backbone(x_BFD).flatten()])


def test_dropout_is_a_function_of_member_rank_and_step() -> None:
    one = member(seed=1)
    expected = masks(one, 2, 10)
    torch.manual_seed(99)
    assert torch.equal(masks(one, 2, 10), expected)
    assert torch.equal(masks(member(seed=1), 2, 10), expected)
    assert not torch.equal(masks(one, 3, 10), expected)
    assert not torch.equal(masks(one, 2, 11), expected)
    assert not torch.equal(masks(one, 10, 2), expected)


def test_members_drop_different_embeddings() -> None:
    kept = {}
    for one in (member(seed=1), member(seed=2), member("wukong", seed=1)):
        masks(one, 0, 0)
        one.reseed(0, 0)
        kept[one.seed] = one.dropout(torch.ones(B, 4, 8)) > 0
    assert len(kept) == 3
    for first, second in itertools.combinations(kept.values(), 2):
        # Independent masks agree where both keep or both drop: 0.7^2 + 0.3^2.
        assert (first == second).float().mean().item() == pytest.approx(0.58, abs=0.08)


def test_layers_of_a_member_drop_different_elements() -> None:
    one = member(seed=1).train()
    one.reseed(0, 0)
    layers = [layer for layer in one.modules() if isinstance(layer, Dropout) and layer.p > 0]
    for layer in layers:
        layer.p = 0.5
    first, second = (layer(torch.ones(100)) for layer in layers)
    assert not torch.equal(first, second)


# The whole model


@pytest.mark.parametrize("dense", [SCHEMA.dense, ()])
def test_one_logit_a_member(dense: tuple[str, ...]) -> None:
    schema = Schema(name="tiny", dense=dense, sparse=SCHEMA.sparse, labels=SCHEMA.labels)
    model = build(schema=schema).eval()
    logits_BM = model(random_batch(schema))
    assert logits_BM.shape == (B, len(JOB))
    for index, spec in enumerate(JOB):
        assert_close(build([spec], schema).eval()(random_batch(schema)), logits_BM[:, [index]])


def test_shared_tables_serve_all_members() -> None:
    model = build(members("dcnv2*2", "rankmixer", "wukong", tables="shared"))
    assert len(list(model.embedding.parameters())) == len(SCHEMA.sparse)
    for parameter in model.embedding.parameters():
        nn.init.zeros_(parameter)
    silent_BM = model(random_batch())
    for parameter in model.embedding.parameters():
        nn.init.normal_(parameter)
    assert (model(random_batch()) - silent_BM).abs().amax(dim=0).min() > 1e-3


def test_bf16_is_near_fp32_and_leaves_parameters_alone() -> None:
    model = build().eval()
    exact_BM = model(random_batch())
    model.members.precision = "bf16"
    logits_BM = model(random_batch())
    assert logits_BM.dtype == torch.bfloat16
    assert_close(logits_BM.float(), exact_BM, rtol=0.1, atol=0.05)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def gradients(specs: Sequence[MemberSpec], loss: Literal["independent", "joint"] = "independent") -> dict[str, Tensor]:
    task = ClickTask(build(specs), loss).train()
    for one in task.model.members:
        one.reseed(0, 0)
    task(random_batch())[0].backward()
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def test_in_one_job_each_member_gets_the_gradient_that_it_gets_alone() -> None:
    together = gradients(JOB)
    for spec in JOB:
        alone = gradients([spec])
        own = {name for name in together if f"{spec.name}." in name or f"{spec.name}/" in name}
        assert own == set(alone)
        for name, gradient in alone.items():
            assert_close(together[name], gradient, rtol=1e-5, atol=1e-8)


def test_the_joint_loss_gives_other_gradients() -> None:
    joint, independent = gradients(JOB, "joint"), gradients(JOB)
    assert joint.keys() == independent.keys()
    heads = [name for name in joint if ".head." in name and name.endswith("weight")]
    assert len(heads) == len(JOB)
    assert not any(torch.allclose(joint[name], independent[name]) for name in heads)


def test_outputs_carry_no_gradients() -> None:
    loss, outputs = ClickTask(build())(random_batch())
    assert loss.requires_grad
    assert not outputs.losses_M.requires_grad
    assert not outputs.logits_BM.requires_grad


# The loss


def logits_and_labels() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, 3, generator=generator), torch.randint(2, (B,), generator=generator).float()


def test_the_independent_loss_is_the_sum_of_member_losses() -> None:
    logits_BM, labels_B = logits_and_labels()
    loss, outputs = ClickLoss("independent")(logits_BM, labels_B, torch.ones(B))
    expected = [binary_cross_entropy_with_logits(logits_B, labels_B) for logits_B in logits_BM.T]
    assert_close(outputs.losses_M, torch.stack(expected))
    assert_close(loss, sum(expected))


def test_the_joint_loss_is_that_of_the_mean_logit() -> None:
    logits_BM, labels_B = logits_and_labels()
    loss, outputs = ClickLoss("joint")(logits_BM, labels_B, torch.ones(B))
    assert_close(loss, binary_cross_entropy_with_logits(mean_logit(logits_BM), labels_B))
    assert_close(outputs.losses_M, ClickLoss("independent")(logits_BM, labels_B, torch.ones(B))[1].losses_M)


@pytest.mark.parametrize("kind", ["independent", "joint"])
def test_rows_of_weight_0_add_nothing(kind: Literal["independent", "joint"]) -> None:
    logits_BM, labels_B = logits_and_labels()
    weights_B = (torch.arange(B) < 20).float()
    full = logits_BM.clone().requires_grad_()
    loss, _ = ClickLoss(kind)(full, labels_B, weights_B)
    short, _ = ClickLoss(kind)(logits_BM[:20], labels_B[:20], torch.ones(20))
    # Divided by the rows of the batch, not by those that count.
    assert_close(loss * B, short * 20)
    loss.backward()
    assert full.grad is not None
    assert full.grad[:20].all()
    assert not full.grad[20:].any()


def test_weights_scale_the_loss_of_their_rows() -> None:
    logits_BM, labels_B = logits_and_labels()
    weights_B = torch.rand(B, generator=torch.Generator().manual_seed(1))
    rows_BM = torch.stack([cross_entropy(logits_BM[[i]], labels_B[[i]], torch.ones(1)) for i in range(B)])
    assert_close(cross_entropy(logits_BM, labels_B, weights_B), (rows_BM * weights_B[:, None]).mean(dim=0))


def test_half_precision_logits_are_scored_in_float32() -> None:
    logits_BM, labels_B = logits_and_labels()
    loss, _ = ClickLoss("independent")(logits_BM.bfloat16(), labels_B, torch.ones(B))
    assert loss.dtype == torch.float32
    assert_close(loss, ClickLoss("independent")(logits_BM.bfloat16().float(), labels_B, torch.ones(B))[0])


# What cannot work


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim 0 must be a multiple of 4; 4 is"),
        ({"embedding_dim": 10}, "embedding_dim 10 must be a multiple of 4; 12 is"),
        ({"embedding_dropout": 1.0}, "embedding_dropout 1.0"),
        ({"embedding_dropout": -0.1}, "embedding_dropout -0.1"),
        ({"dense_hidden": (64, 0)}, r"dense_hidden \(64, 0\)"),
    ],
)
def test_model_config_names_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)


def test_a_width_that_a_backbone_refuses_names_the_member(monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(nn.Module):
        Config: ClassVar[type] = WukongConfig

        def __init__(self, num_fields: int, dim: int, config: WukongConfig) -> None:
            raise ValueError(f"num_fm is {config.num_fm}: {num_fields} fields of {dim} do not suit it")

    monkeypatch.setitem(BACKBONES, "wukong", Picky)
    with pytest.raises(InputError, match=r"^member wukong_2: num_fm is 2: 4 fields of 8 do not suit it"):
        RecModel(SCHEMA, members("wukong:name=wukong_2"))
