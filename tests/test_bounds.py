"""An id without a row is refused at the embeddings' door, naming feature, row, id and number of ids."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.embeddings.bounds import IdBounds
from recsys.embeddings.config import EmbeddingConfig, Owner
from recsys.embeddings.tables import Tables
from recsys.members import parse_members
from recsys.model import RecModel
from tests.batches import batch_of

SPARSE = {"c": 11, "a": 5, "b": 7}


def jagged(rows: dict[str, list[list[int]]], kind: torch.dtype = torch.int32) -> KeyedJaggedTensor:
    """Ids of each feature, a list a row."""
    values = [index for own in rows.values() for row in own for index in row]
    lengths = [len(row) for own in rows.values() for row in own]
    return KeyedJaggedTensor(
        keys=list(rows), values=torch.tensor(values, dtype=kind), lengths=torch.tensor(lengths, dtype=torch.int32)
    )


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (
            {"c": [[0], [11]], "a": [[1], [1]], "b": [[2], [2]]},
            r"feature c, row 1 of the batch: id 11 .* 11 ids; .*11\)",
        ),
        ({"c": [[0], [10]], "a": [[-1], [1]], "b": [[2], [2]]}, "feature a, row 0 of the batch: id -1 .* 5 ids"),
        ({"b": [[], [], [6, 0, 7]], "c": [[0], [], [1]]}, "feature b, row 2 of the batch: id 7 .* 7 ids"),
        ({"a": [[], []], "b": [[], []], "c": [[3], [99]]}, "feature c, row 1 of the batch: id 99 .* 11 ids"),
        ({"a": [[4, 4], [0, 5]], "b": [[], []]}, "feature a, row 1 of the batch: id 5 .* 5 ids"),
    ],
)
def test_an_id_without_a_row_is_named(rows: dict[str, list[list[int]]], told: str, kind: torch.dtype) -> None:
    with pytest.raises(InputError, match=told):
        IdBounds(SPARSE)(jagged(rows, kind))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "rows",
    [
        {"c": [[0, 10], [10]], "a": [[4], []], "b": [[6], [0]]},
        {"b": [[], []], "a": [[], []], "c": [[10], []]},
        {"c": [[], []]},
    ],
)
def test_ids_with_rows_pass(rows: dict[str, list[list[int]]], kind: torch.dtype) -> None:
    IdBounds(SPARSE)(jagged(rows, kind))


def test_features_without_a_bound_are_exempt() -> None:
    rows = {"raw": [[-(2**63)], [2**63 - 1]], "c": [[3], [10]]}
    IdBounds({"raw": 2**64, "c": 11})(jagged(rows, torch.int64))
    with pytest.raises(InputError, match="feature c, row 1"):
        IdBounds({"raw": 2**64, "c": 11})(jagged(rows | {"c": [[3], [11]]}, torch.int64))


def test_it_can_be_left_out() -> None:
    wrong = jagged({"c": [[99]], "a": [[0]], "b": [[0]]})
    IdBounds(SPARSE, "never")(wrong)
    with pytest.raises(InputError, match="id 99"):
        IdBounds(SPARSE, "always")(wrong)


def test_tables_and_models_refuse_it_before_they_look_it_up() -> None:
    tables = Tables(SPARSE, [Owner(name="m", seed="s", config=EmbeddingConfig())]).to_empty(device="cpu")
    with pytest.raises(InputError, match="feature a, row 0 of the batch: id 5 has no row in tables of 5 ids"):
        tables(jagged({"c": [[0]], "a": [[5]], "b": [[0]]}))
    schema = Schema(name="s", dense=(), sparse=SPARSE, labels=("label",))
    model = RecModel(schema, parse_members(["fnn"], 0)).to_empty(device="cpu")
    ids = {name: torch.zeros(3, dtype=torch.int64) for name in SPARSE}
    model(batch_of(torch.zeros(3, 0), ids, torch.zeros(3)))
    ids["b"][2] = -7
    with pytest.raises(InputError, match="feature b, row 2 of the batch: id -7"):
        model(batch_of(torch.zeros(3, 0), ids, torch.zeros(3)))


def test_it_has_nothing_to_save_and_is_not_in_what_is_compiled() -> None:
    bounds = IdBounds(SPARSE)
    assert not bounds.state_dict()
    seen: list[bool] = []

    class Traced(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            seen.append(torch.compiler.is_compiling())
            lengths = torch.ones(3, dtype=torch.int32)
            bounds(KeyedJaggedTensor(keys=list(SPARSE), values=values, lengths=lengths))
            return values + 1

    torch.export.export(Traced(), (torch.zeros(3, dtype=torch.int64),), strict=False)
    assert all(seen)
