"""Members: what each is made of, read from texts like `wukong*4` or `dcnv2:name=wide,width=4,dense_lr=3e-4`."""

import dataclasses
import itertools
import json
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from recsys.backbones import BACKBONES
from recsys.config import InputError, dump, load, nearest
from recsys.embeddings.config import EmbeddingConfig
from recsys.embeddings.precision import Precision
from recsys.own_code import find_backbone

# Between the seeds of members of one backbone, so that jobs of seed 0, 1, 2, ... have no member in common.
SEED_STRIDE = 1000

if TYPE_CHECKING:
    BackboneConfigs = Any
else:
    BackboneConfigs = dataclasses.make_dataclass(
        "BackboneConfigs",
        [(name, kind.Config, dataclasses.field(default=kind.Config())) for name, kind in BACKBONES.items()],
        frozen=True,
        kw_only=True,
    )
    BackboneConfigs.__module__ = __name__
    BackboneConfigs.__doc__ = "Settings of each backbone, under its name."


@dataclass(frozen=True, kw_only=True)
class ModelConfig(EmbeddingConfig):
    """What all members have, unless a member says otherwise."""

    embedding_dropout: float = 0.0
    """Share of embedding values that are dropped in training, before the backbone."""
    dense_hidden: tuple[int, ...] = (64,)
    """Hidden widths of the layers that turn the dense columns into one more field."""
    head_hidden: tuple[int, ...] = ()
    """Hidden widths between a backbone and its logit; Wukong and RankMixer gain by some."""
    tables: Literal["private", "shared"] = "private"
    """Whether each member has tables of its own; members that share tables are not independent."""
    precision: Precision = "fp32"
    """Arithmetic of the members: bf16 and fp16 are autocast, with parameters and tables in fp32, and fp16 scales the
    loss up against underflow. tf32 has the matrix products of fp32 rounded to 10 bits, on a CUDA device."""
    batched: Literal["auto", "on", "off"] = "auto"
    """Whether members of one make are computed as one, with the same results to rounding: auto measures both ways
    when a job starts on a GPU, and does not on a CPU, where it never paid."""
    compile: bool = False
    """Compile the backbones for training by torch.compile, which takes up to a minute when a job starts; members are
    then computed one by one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile and self.batched == "on":
            raise ValueError("batched on cannot be compiled; leave it at auto, or leave compile out")
        if not 0 <= self.embedding_dropout < 1:
            raise ValueError(f"embedding_dropout {self.embedding_dropout} must lie in [0, 1)")
        for name in ("dense_hidden", "head_hidden"):
            if any(width < 1 for width in getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} must hold widths of at least 1")


OF_THE_JOB = ("tables", "precision", "batched", "compile", "stochastic_rounding")
"""Fields of ModelConfig that no member can have otherwise than the others."""


@dataclass(frozen=True, kw_only=True)
class MemberSpec:
    """One member: which backbone of what size, and the seed of all that is random in it."""

    name: str
    backbone: str
    seed: int
    model: ModelConfig
    sizes: Any
    """The backbone's config."""
    dense_lr: float | None = None
    table_lr: float | None = None
    """Learning rates, where they are not the job's."""


# A path has a dot or a slash before its colon, or a capital after it. Options, which begin with a colon too, have a =
# there, which no path can have.
_PATH = r"\w*[./][\w./]*:\w+|\w+:[A-Z]\w*"
_MEMBER = re.compile(rf"(?P<backbone>{_PATH}|\w+)(?:\*(?P<count>[1-9]\d*))?(?P<options>:.*)?", re.ASCII)
FILE_COLUMNS = ("row", "label", "weight")
"""Columns of a file of predictions beside the members'."""
RESERVED = ("merged", "shared", *FILE_COLUMNS)
LARGEST_RUNG = 10_000


@dataclass(frozen=True, kw_only=True)
class _Own:
    """Options that are a member's alone."""

    name: str | None = None
    seed: int | None = None
    dense_lr: float | None = None
    table_lr: float | None = None
    width: float = 1.0
    depth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("dense_lr", "table_lr"):
            lr = getattr(self, name)
            if lr is not None and not 0 <= lr < math.inf:
                raise ValueError(f"{name} {lr} must be a finite number, and not negative")
        for name in ("width", "depth"):
            if not 1 <= getattr(self, name) <= LARGEST_RUNG:
                raise ValueError(f"{name} {getattr(self, name)} must lie between 1 and {LARGEST_RUNG:,}")


def parse_members(
    texts: Sequence[str], seed: int, model: ModelConfig | None = None, backbones: BackboneConfigs | None = None
) -> tuple[MemberSpec, ...]:
    """Read members: `NAME`, `NAME*COUNT`, each with options `:KEY=VALUE,KEY=VALUE`.

    NAME is one of BACKBONES, or `package.module:Class`, a Backbone of the user's own, whose members have the class's
    name in lower case and whose sizes begin as its Config has them.

    The first member of a backbone gets `seed`, its next ones seed + 1000, ...; those with a seed or a name of their own
    are not counted for it. So what a member is called and draws does not depend on members of other backbones. Options
    are `name`, `seed`, `dense_lr`, `table_lr`, `width` and `depth` (rungs of the backbone's ladder), the backbone's own
    fields, and those of ModelConfig that are not the whole job's. Widths of several layers are written 256-128.

    Raises:
        InputError: an unknown backbone or option, with the nearest right ones, a value that cannot be, or no member.
    """
    model, backbones = model or ModelConfig(), backbones or BackboneConfigs()
    members: list[MemberSpec] = []
    names: Counter[str] = Counter()
    seeds: Counter[str] = Counter()
    for text in texts:
        match = _MEMBER.fullmatch(text)
        if not match:
            raise InputError(
                f"member {text!r} is neither NAME nor NAME*COUNT, like dcnv2 or dcnv2*4, with options like "
                "dcnv2:width=2,dense_lr=3e-4, nor a class of your own, package.module:Class"
            )
        backbone = match["backbone"]
        usual = _usual_sizes(backbone, text, backbones)
        own, of_model, sizes = _options(match["options"] or "", text, model, usual)
        kind = backbone.rpartition(":")[2].lower()
        for index in range(int(match["count"] or 1)):
            name = _numbered(own.name or kind, index if own.name else names[backbone])
            first = seed if own.seed is None else own.seed
            names[backbone] += own.name is None
            number = seeds[backbone] if own.seed is None else index
            seeds[backbone] += own.seed is None
            members.append(
                MemberSpec(
                    name=name,
                    backbone=backbone,
                    seed=first + number * SEED_STRIDE,
                    model=of_model,
                    sizes=sizes,
                    dense_lr=own.dense_lr,
                    table_lr=own.table_lr,
                )
            )
    _check(members)
    return tuple(members)


def _usual_sizes(backbone: str, text: str, backbones: BackboneConfigs) -> Any:
    """The config of a backbone where a member has no options of its own."""
    if backbone in BACKBONES:
        return getattr(backbones, backbone)
    if ":" not in backbone:
        raise InputError(f"unknown backbone {backbone!r}; {nearest(backbone, BACKBONES)} (or package.module:Class)")
    sizes = find_backbone(backbone, f"member {text!r}").Config()
    of_members = {field.name for kind in (_Own, ModelConfig) for field in dataclasses.fields(kind)}
    taken = [field.name for field in dataclasses.fields(sizes) if field.name in of_members]
    if taken:
        raise InputError(
            f"member {text!r}: {type(sizes).__name__} has a field {taken[0]!r}, which is an option of every member; "
            "give it another name"
        )
    return sizes


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name}_{index + 1}"


def _check(members: list[MemberSpec]) -> None:
    if not members:
        raise InputError(f"no member named; known backbones are {', '.join(BACKBONES)}")
    names = Counter(member.name for member in members)
    for member in members:
        why = ""
        if names[member.name] > 1:
            why = f"{names[member.name]} members have it; give one another, as in {member.backbone}:name=other"
        elif member.name in RESERVED:
            why = f"predictions have {', '.join(RESERVED)} beside the members"
        elif not re.fullmatch(r"\w+", member.name, re.ASCII):
            why = "a name is a word of letters, digits and underscores"
        elif hasattr(nn.ModuleDict, member.name):
            why = "it is an attribute of torch's modules"
        if why:
            raise InputError(f"member name {member.name!r} cannot be: {why}")
    for one, other in itertools.combinations(members, 2):
        if replace(one, name="") == replace(other, name=""):
            raise InputError(
                f"members {one.name} and {other.name} are the same: backbone {one.backbone}, seed {one.seed} and all "
                "settings; a merge of both gains nothing, so give one another seed"
            )
    if members[0].model.tables == "shared":
        _check_shared(members)


def _check_shared(members: list[MemberSpec]) -> None:
    for name in (field.name for field in dataclasses.fields(EmbeddingConfig)):
        values = {getattr(member.model, name) for member in members}
        if len(values) > 1:
            raise InputError(f"members that share tables need one {name}, not {', '.join(map(str, sorted(values)))}")
    for member in members:
        if member.table_lr is not None:
            raise InputError(f"member {member.name}: tables are shared, so --optimizer.table-lr is all members' rate")


def _options(text: str, where: str, model: ModelConfig, sizes: Any) -> tuple[_Own, ModelConfig, Any]:
    """Read what follows the colon of a member's options, over its defaults."""
    parts: tuple[Any, ...] = (_Own(), model, sizes)
    hints = [typing.get_type_hints(type(part)) for part in parts]
    known = {key for hint in hints for key in hint} - set(OF_THE_JOB)
    changes: list[dict[str, Any]] = [{}, {}, {}]
    for option in filter(None, text.removeprefix(":").split(",")):
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            told = f"the whole job has one {key}" if key in OF_THE_JOB else nearest(key, sorted(known))
            told = "widths of several layers are written 256-128" if key.isdigit() else told
            raise InputError(f"member {where!r}: {option!r} is no option KEY=VALUE; {told}")
        for hint, change in zip(hints, changes, strict=True):
            if key in hint:
                change[key] = _value(value, hint[key])
    read = [
        load(type(part), dump(part) | change, f"member {where!r}") for part, change in zip(parts, changes, strict=True)
    ]
    own, of_model, of_backbone = read
    try:
        return own, of_model, of_backbone.ladder(own.width, "width").ladder(own.depth, "depth")
    except ValueError as error:
        raise InputError(f"member {where!r}: {error}") from None


def _value(text: str, hint: Any) -> Any:
    """Read an option's text as JSON would have it for a field of this type."""
    if text.lower() == "none":
        return None
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        return [int(width) if width.isdigit() else width for width in filter(None, text.split("-"))]
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def describe_member(spec: MemberSpec, model: ModelConfig, backbones: BackboneConfigs) -> str:
    """Write a member as a text that `parse_members` reads back, beside a job's own `model` and `backbones`."""
    options: dict[str, Any] = {"name": spec.name, "seed": spec.seed}
    options |= {key: getattr(spec, key) for key in ("dense_lr", "table_lr") if getattr(spec, key) is not None}
    for now, usual in ((spec.model, model), (spec.sizes, _usual_sizes(spec.backbone, spec.name, backbones))):
        fields = (field.name for field in dataclasses.fields(now))
        options |= {key: getattr(now, key) for key in fields if getattr(now, key) != getattr(usual, key)}
    for key in ("batched", "compile"):  # how members are computed, not what they are
        options.pop(key, None)
    for key in OF_THE_JOB:
        if key in options:
            raise InputError(f"member {spec.name} has {key} {options[key]}, where the job has {getattr(model, key)}")
    return f"{spec.backbone}:" + ",".join(f"{key}={_text(value)}" for key, value in options.items())


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, bool | float) else str(value)


def renamed(members: Sequence[MemberSpec], taken: Mapping[str, object]) -> tuple[MemberSpec, ...]:
    """Give members names that are not `taken`, numbering up."""
    names = set(taken)
    out: list[MemberSpec] = []
    for member in members:
        index, name = 0, member.name
        while name in names:
            index += 1
            name = _numbered(re.sub(r"_\d+$", "", member.name), index)
        names.add(name)
        out.append(replace(member, name=name))
    return tuple(out)
