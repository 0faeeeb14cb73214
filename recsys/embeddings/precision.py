"""What tables hold their values in, and what a device can do with that.

FBGEMM's kernels for a CPU have no bf16, and take several parameters of the fused optimizer without looking at them: a
run would go on, and be another one than was asked for. So they are refused before tables are made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torchrec.modules.embedding_configs import DataType

from recsys.config import InputError
from recsys.embeddings.config import TABLE_SEPARATOR, EmbeddingConfig, Owner, TableDtype

C = TypeVar("C", bound=EmbeddingConfig)

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

DATA_TYPES: dict[TableDtype, DataType] = {"fp32": DataType.FP32, "fp16": DataType.FP16, "bf16": DataType.BF16}
BYTES: dict[TableDtype, int] = {"fp32": 4, "fp16": 2, "bf16": 2}

# Parameters of FBGEMM that its kernels for a CPU ignore, with the value at which they do nothing.
IGNORED_ON_CPU = {"weight_decay": 0.0, "max_norm": 0.0, "stochastic_rounding": False}


def check_precision(configs: Sequence[EmbeddingConfig], device: torch.device) -> None:
    """Look whether this device can train tables as their owners ask for.

    Raises:
        InputError: it cannot; says why, and what would work.
    """
    dtypes = {config.table_dtype for config in configs}
    rounds = any(config.stochastic_rounding for config in configs)
    if rounds and dtypes == {"fp32"}:
        raise InputError(
            "--model.stochastic-rounding: all tables are fp32, and are not rounded; use it with --model.table-dtype "
            "fp16 or bf16, or leave it out"
        )
    if device.type == "cpu" and "bf16" in dtypes:
        raise InputError(
            "--model.table-dtype bf16: FBGEMM has no bf16 tables on a CPU; use fp16 here, or bf16 on a CUDA device"
        )
    if device.type == "cpu" and rounds:
        raise InputError(
            "--model.stochastic-rounding: FBGEMM ignores it on a CPU and rounds to the nearest value; leave it out "
            "here, or train on a CUDA device"
        )


def set_arithmetic(precision: Precision, device: torch.device) -> None:
    """Have matrix products of fp32 rounded to tf32, or not.

    Raises:
        InputError: a CPU has no tf32.
    """
    if device.type == "cpu":
        if precision == "tf32":
            raise InputError("--model.precision tf32: a CPU has none; use fp32 or bf16 here, or tf32 on a CUDA device")
        return
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision == "tf32"


def check_replicated(types: Mapping[str, str], owners: Mapping[str, Owner]) -> None:
    """Look whether a plan replicates tables of less than fp32.

    Those are in no fused optimizer, which computes in fp32 and rounds but the result: they would train otherwise.

    Args:
        types: table, its owner's name first, to its sharding type.
        owners: by name.

    Raises:
        InputError: it does, naming the table.
    """
    for table, sharding_type in types.items():
        owner = owners.get(table.partition(TABLE_SEPARATOR)[0])
        if owner and owner.config.table_dtype != "fp32" and sharding_type == "data_parallel":
            raise InputError(
                f"table {table} is {owner.config.table_dtype} and data_parallel, which would train it otherwise than "
                "under other plans; use --model.table-dtype fp32, or another --sharding.types"
            )


def for_inference(config: C, device: torch.device) -> C:
    """What a config trained with becomes where nothing is updated: bf16 tables, which no CPU reads, are fp32 there."""
    unreadable = device.type == "cpu" and config.table_dtype == "bf16"
    return replace(config, stochastic_rounding=False, table_dtype="fp32" if unreadable else config.table_dtype)


def fused_params(optimizer: Mapping[str, Any], configs: Sequence[EmbeddingConfig], device: torch.device) -> dict:
    """FBGEMM's parameters for tables of these owners, which it must not ignore.

    Args:
        optimizer: what the tables' optimizer asks for.
        configs: of all owners.
        device: where tables are trained.

    Raises:
        InputError: this device would ignore one of them.
    """
    # FBGEMM's own default is to round stochastically where it can.
    params = {**optimizer, "stochastic_rounding": any(config.stochastic_rounding for config in configs)}
    for name, neutral in IGNORED_ON_CPU.items():
        if device.type == "cpu" and params.get(name, neutral) != neutral:
            raise InputError(f"{name} {params[name]} of tables: FBGEMM ignores it on a CPU; train on a CUDA device")
    return params
