"""The jobs of a compression study: whole tables and smaller embeddings, with several learning rates and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from recsys.config import InputError
from recsys.data.schema import Schema
from recsys.embeddings.config import EmbeddingKind
from recsys.embeddings.fields import Embeddings
from recsys.members import SEED_STRIDE
from recsys.model import RecModel
from recsys.studies.compression.config import CompressionStudyConfig
from recsys.studies.jobs import Job
from recsys.studies.rivals import cost
from recsys.training.config import TrainConfig

WHOLE: EmbeddingKind = "tables"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kind of embeddings at one size."""

    kind: EmbeddingKind
    compression: float = 1.0
    """Asked for."""
    block_size: int = 32
    sign: bool = False

    @property
    def name(self) -> str:
        """As folders have it."""
        if self.kind == WHOLE:
            return WHOLE
        of_robe = f"_z{self.block_size}{'_sign' if self.sign else ''}" if self.kind == "robe" else ""
        return f"{self.kind}_x{self.compression:g}{of_robe}"

    @property
    def title(self) -> str:
        """As pictures have it: the kind, without its size."""
        if self.kind == WHOLE:
            return "whole tables"
        return f"robe, Z = {self.block_size}{', sign' if self.sign else ''}" if self.kind == "robe" else self.kind


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a variant holds."""

    floats: int
    """In its embeddings, projections included."""
    bytes: int


def variants(config: CompressionStudyConfig) -> list[Variant]:
    """Whole tables first, then each kind from its largest to its smallest."""
    found = [Variant(kind=WHOLE)]
    for kind in config.kinds:
        for block in config.block_sizes if kind == "robe" else (32,):
            for compression in sorted(config.compressions):
                sign = config.sign and kind == "robe"
                found.append(Variant(kind=kind, compression=compression, block_size=block, sign=sign))
    return found


def train_config(
    config: CompressionStudyConfig, recipe: TrainConfig, variant: Variant, table_lr: float, seed: int
) -> TrainConfig:
    """The run of a variant.

    Raises:
        ValueError: settings that cannot be.
    """
    name = f"{variant.name}_lr{table_lr:g}_s{seed}"
    model = replace(
        recipe.model,
        tables="private",
        embeddings=variant.kind,
        compression=variant.compression,
        block_size=variant.block_size,
        sign=variant.sign,
    )
    return replace(
        recipe,
        data=config.data or recipe.data,
        out=config.out / "runs" / name,
        members=(f"{config.backbone}:name={config.backbone},seed={recipe.seed + seed * SEED_STRIDE}",),
        loss="independent",
        merge="mean_logit",
        resume="auto",
        model=model,
        optimizer=replace(recipe.optimizer, table_lr=table_lr),
    )


def size_of(train: TrainConfig, schema: Schema) -> Size:
    """Count what a run's embeddings hold.

    Raises:
        InputError: they cannot be that small.
    """
    embeddings: Embeddings = RecModel(schema, train.specs()).embedding
    parameters = list(embeddings.parameters())
    return Size(
        floats=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )


def possible(
    config: CompressionStudyConfig, recipe: TrainConfig, schema: Schema
) -> tuple[dict[Variant, Size], dict[Variant, str]]:
    """Variants with their sizes, and those that cannot be with the reason."""
    sizes: dict[Variant, Size] = {}
    lost: dict[Variant, str] = {}
    for variant in variants(config):
        try:
            sizes[variant] = size_of(train_config(config, recipe, variant, recipe.optimizer.table_lr, 0), schema)
        except (InputError, ValueError) as error:
            lost[variant] = str(error)
    if not any(variant.kind != WHOLE for variant in sizes):
        raise InputError(f"none of the study's embeddings can be: {'; '.join(lost.values())}")
    return sizes, lost


def job(
    config: CompressionStudyConfig, recipe: TrainConfig, schema: Schema, variant: Variant, table_lr: float, seed: int
) -> Job:
    """The job of a variant at a learning rate and a seed."""
    train = train_config(config, recipe, variant, table_lr, seed)
    (spec,) = train.specs()
    return Job(name=train.out.name, kind="compressed", config=train, cost=cost(spec, schema))


def rates(config: CompressionStudyConfig, recipe: TrainConfig) -> Sequence[float]:
    """Learning rates to try."""
    return config.table_lrs or (recipe.optimizer.table_lr,)
