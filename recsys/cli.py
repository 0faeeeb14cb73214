"""The command line: `recsys VERB`. Each verb parses a config and calls one function.

Only what a verb needs is imported, so that help is instant: torch takes seconds.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import TYPE_CHECKING, Any, TypeVar

from recsys.config import InputError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from recsys.metrics.click import ClickMetrics
    from recsys.metrics.groups import Grouped

T = TypeVar("T")

# GNU OpenMP's threads spin before they sleep. Where anything else runs on their cores, that spinning starves the very
# thread they wait for: a step of 45 ms took 210 to 1700 ms. Short spins cost about 10 % on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Problems that `recsys data verify` prints; it counts the others.
MAX_PROBLEMS = 20

# `recsys data VERB`
DATA_VERBS: dict[str, str] = {
    "download": "fetch a public click log: criteo_1tb, criteo_kaggle or avazu",
    "verify": "check every file of a prepared folder against its schema and its manifest",
    "show": "what the columns of a prepared folder hold, and how much they tell of the label",
}

# `recsys study VERB`
STUDY_VERBS: dict[str, str] = {
    "merge": "is a merge of independent members better than one bigger model of the same inference budget?",
    "compression": "what do embeddings of 10 to 10,000 times fewer floats cost in quality, and gain in speed?",
}

# `recsys bench VERB`
BENCH_VERBS: dict[str, str] = {
    "compare": "two files of benchmark results side by side; can fail where a ratio fell",
}

VERBS = {
    "synth": "write a synthetic click log in Criteo's format, with known true probabilities",
    "prepare": "raw click logs to Parquet and schema.json",
    "multihot": "copy prepared data with several ids a row and feature, as MLPerf's DLRM-DCNv2 trains on",
    "data": "download, verify or show data: `recsys data --help`",
    "train": "train members over sharded tables, merge them, write a run folder",
    "launch": "run train, prepare or study on a scheduler: slurm, kubernetes, ray, ...; `--dryrun` prints the request",
    "evaluate": "metrics of a run's members and their merge on held-out rows",
    "merge": "make one run of the members of several, or one file of several files of predictions",
    "predict": "write predictions of a run, by all members, some, or as many as a time budget allows",
    "report": "one page on one run or several, finished or not: curves, metrics, calibration, timings, configs",
    "study": "experiments of many runs with a report: `recsys study --help`",
    "sweep": "train a recipe with other settings again and again, and keep the best",
    "plan": "where tables go on a cluster that need not be there: memory and step time; `recsys plan diff A B`",
    "shard-bench": "run sharding plans on what is at hand: measured beside predicted, and rates fitted to it",
    "bench": "results of benchmarks: `recsys bench --help`",
    "backbones": "list the backbones, with parameters and FLOPs a row as they scale",
    "doctor": "check that the environment works, and say what mends it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 where a check failed, 2 for bad input."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["--version"]:
            from recsys import __version__

            print(f"recsys {__version__}")
            return 0
        status = _run("", VERBS, arguments)
    except InputError as error:
        # Ranks raise alike, and one line is enough; `process_group` tells what a rank alone ran into.
        if os.environ.get("RANK", "0") == "0":
            print(f"recsys: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"recsys: {f'{error.filename}: {error.strerror}' if error.filename else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _run(group: str, verbs: dict[str, str], arguments: list[str]) -> int:
    """Run the verb that `arguments` begin with, or list the group's verbs."""
    prog = f"recsys {group}".strip()
    if not arguments or arguments[0] in ("-h", "--help"):
        listed = "\n".join(f"  {verb:<13}{what}" for verb, what in verbs.items())
        print(f"usage: {prog} VERB ...\n\n{listed}\n\n`{prog} VERB --help` shows a verb's options.")
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in verbs:
        raise InputError(f"unknown verb {verb!r}; {nearest(verb, verbs)}")
    status: int = globals()[f"{group and '_'}{group}_{verb.replace('-', '_')}"](rest)
    return status


def _parse(kind: type[T], verb: str, arguments: Sequence[str], default: Any = None) -> T:
    import tyro

    options = {} if default is None else {"default": default}
    try:
        with redirect_stderr(io.StringIO()) as told:
            config: T = tyro.cli(kind, prog=f"recsys {verb}", args=arguments, **options)
    except SystemExit as stop:
        # What a config's __post_init__ says is one line already; tyro would wrap it in a box, on every rank.
        error = stop.__context__
        if isinstance(getattr(error, "arg", None), str) and error is not None:  # of a part of the config, not an option
            error = error.__context__
        if isinstance(error, ValueError):
            raise InputError(str(error)) from None
        print(told.getvalue(), end="", file=sys.stderr)
        raise
    return config


def _synth(arguments: list[str]) -> int:
    from recsys.data.synthetic import SynthConfig, synthesize

    config = _parse(SynthConfig, "synth", arguments)
    from recsys.progress import progress

    with progress("synth", total=config.num_rows, unit="rows") as advance:
        summary = synthesize(config, progress=advance)
    print(f"{config.out}: {summary.rows:,} rows, {summary.ctr:.2%} clicks")
    print(f"Bayes-optimal: AUC {summary.bayes_auc:.4f}, logloss {summary.bayes_logloss:.4f}, NE {summary.bayes_ne:.4f}")
    return 0


def _prepare(arguments: list[str]) -> int:
    from recsys.data.engine import WORKER_ENVIRONMENT

    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from recsys.data.prepare import prepare
    from recsys.data.settings import PrepareConfig

    config = _parse(PrepareConfig, "prepare", arguments)
    if config.dry_run:
        from recsys.data.estimate import estimate

        print(*estimate(config).lines(), sep="\n")
        return 0
    manifest = prepare(config)
    for name, split in manifest["splits"].items():
        print(f"{config.out / name}: {split['num_rows']:,} rows, label mean {split['label_mean']:.4f}")
    if manifest["num_malformed"]:
        print(f"left out {manifest['num_malformed']} malformed rows; {config.out}/manifest.json names the first")
    return 0


def _multihot(arguments: list[str]) -> int:
    from recsys.data.multihot_files import MultiHotConfig, store_multi_hot

    config = _parse(MultiHotConfig, "multihot", arguments)
    manifest = store_multi_hot(config)
    sizes = manifest["multi_hot"]["sizes"].values()
    print(f"{config.out}: {sum(sizes)} ids a row of {len(sizes)} features, {config.distribution} but for the first")
    return 0


def _data(arguments: list[str]) -> int:
    return _run("data", DATA_VERBS, arguments)


def _data_download(arguments: list[str]) -> int:
    from recsys.data.download import SOURCES, DownloadConfig, download

    config = _parse(DownloadConfig, "data download", arguments)
    fetched = download(config)
    for file in fetched:
        record = config.folder / f"{file.name}.sha256"
        if record.exists():
            print(f"sha256 {record.read_text()}", end="")
    came = f"fetched {sum(file.size for file in fetched):,} bytes (files: {len(fetched)})"
    print(f"{config.folder}: {came if fetched else 'all was there'}")
    print(" ".join((SOURCES[config.name].__doc__ or "").split()))
    return 0


def _data_verify(arguments: list[str]) -> int:
    from recsys.data.manifest import Manifest
    from recsys.data.verify import VerifyConfig, verify

    config = _parse(VerifyConfig, "data verify", arguments)
    problems = verify(config.folder, decode=config.decode)
    if problems:
        told = problems[:MAX_PROBLEMS]
        print(*told, sep="\n", file=sys.stderr)
        others = f", of which these are the first {len(told)}" if len(problems) > len(told) else ""
        print(f"{config.folder}: problems found: {len(problems):,}{others}", file=sys.stderr)
        return 1
    manifest = Manifest.load(config.folder)
    how = "every byte hashed, every value decoded" if config.decode else "sizes, footers and statistics alone"
    print(f"{config.folder}: {manifest.num_rows:,} rows in {len(manifest.files):,} files verified: {how}")
    return 0


def _data_show(arguments: list[str]) -> int:
    from recsys.data.show import ShowConfig, show

    show(_parse(ShowConfig, "data show", arguments))
    return 0


def _train(arguments: list[str]) -> int:
    _quieten_libraries()
    from recsys.recipes import RECIPES, find_recipe
    from recsys.training.config import TrainConfig

    if not arguments or arguments[0] in ("-h", "--help"):
        names = "\n".join(f"  {name:<22}{make.__doc__}" for name, make in RECIPES.items())
        print(
            f"usage: recsys train RECIPE ...\n\nRECIPE is a config file, a package.module:function, or one of\n{names}"
        )
        print("\n`recsys train RECIPE --help` shows all options.")
        return 0 if arguments else 2
    recipe, *rest = arguments
    config = _parse(TrainConfig, f"train {recipe}", rest, default=find_recipe(recipe))
    from recsys.distributed import on_all_alike, process_group
    from recsys.training.trainer import Trainer

    with process_group() as world:
        with on_all_alike():  # what one rank alone lacks is agreed on before it gets here
            trainer = Trainer(config, world)
        metrics = trainer.train()
    if metrics:
        _print_metrics(f"{config.out}: validation", metrics)
    return 0


def _launch(arguments: list[str]) -> int:
    from recsys.launching.config import LaunchConfig

    end = arguments.index("--") if "--" in arguments else len(arguments)
    config = _parse(LaunchConfig, "launch", arguments[:end])
    rest = arguments[end + 1 :]
    if not rest:
        raise InputError(f"launch {config.verb}: after --, say what would follow `recsys {config.verb}`")
    _quieten_libraries()
    from recsys.launching.launch import launch
    from recsys.launching.places import Job

    return launch(config, Job(config.verb, _job_config(config.verb, rest), tuple(rest)))


def _job_config(verb: str, arguments: list[str]) -> Any:
    """Read what follows `recsys VERB`, so that a mistake is told here and not by a node, after hours in a queue."""
    if verb == "train":
        from recsys.recipes import find_recipe
        from recsys.training.config import TrainConfig

        recipe, *rest = arguments
        return _parse(TrainConfig, f"train {recipe}", rest, default=find_recipe(recipe))
    if verb == "prepare":
        from recsys.data.settings import PrepareConfig

        return _parse(PrepareConfig, verb, arguments)
    from recsys.studies.compression.config import CompressionStudyConfig
    from recsys.studies.config import MergeStudyConfig

    kinds = {"merge": MergeStudyConfig, "compression": CompressionStudyConfig}
    kind, *rest = arguments
    if kind not in kinds:
        raise InputError(f"unknown study {kind!r}; {nearest(kind, kinds)}")
    recipe, rest = _named(rest, kinds[kind], f"study {kind}")
    return _parse(kinds[kind], f"study {kind} {recipe}", rest)


def _evaluate(arguments: list[str]) -> int:
    _quieten_libraries()
    from recsys.distributed import process_group
    from recsys.training.evaluate import EvaluateConfig, evaluate

    config = _parse(EvaluateConfig, "evaluate", arguments)
    with process_group() as world:
        found = evaluate(config, world)
    if found:
        _print_metrics(f"{config.run}: {config.split}", found.metrics)
        if config.by:
            _print_groups(config.by, found.grouped["merged"])
        if found.tables:
            print(found.tables)
    return 0


def _merge(arguments: list[str]) -> int:
    _quieten_libraries()
    from recsys.studies.config import MergeConfig

    config = _parse(MergeConfig, "merge", arguments)
    if config.of_files:
        _check_parquet(config.out)
        from recsys.studies.merge_files import merge_files

        _print_metrics(f"{config.out}", merge_files(config))
        return 0
    from recsys.distributed import process_group
    from recsys.studies.merge_runs import merge_runs

    with process_group() as world:
        metrics = merge_runs(config, world)
    if metrics:
        _print_metrics(f"{config.out}: validation", metrics)
    return 0


def _predict(arguments: list[str]) -> int:
    _quieten_libraries()
    from recsys.training.request import PredictConfig

    config = _parse(PredictConfig, "predict", arguments)
    _check_parquet(config.out)
    from recsys.distributed import process_group
    from recsys.training.answer import answer

    with process_group() as world:
        found = answer(config, world)
    if found:
        _print_metrics(f"{config.out}: {config.split}", found.metrics)
        if found.tables:
            print(found.tables)
        if found.timing:
            print(", ".join(f"{name} {value}" for name, value in found.timing.items()))
    return 0


def _check_parquet(out: "Path") -> None:
    """See that a file of predictions is not called something else, which others would then take it for."""
    if out.suffix not in ("", ".parquet"):
        raise InputError(f"--out {out}: predictions are written as Parquet; call it {out.with_suffix('.parquet')}")


def _report(arguments: list[str]) -> int:
    from recsys.reporting.config import ReportConfig

    config = _parse(ReportConfig, "report", arguments)
    from recsys.reporting.report import report

    print(report(config))
    return 0


def _plan(arguments: list[str]) -> int:
    from recsys.planning.config import DiffConfig, PlanConfig

    if arguments[:1] == ["diff"]:
        compared = _parse(DiffConfig, "plan diff", arguments[1:])
        from recsys.planning.plan import diff

        diff(compared)
        return 0
    recipe, rest = _named(arguments, PlanConfig, "plan")
    config = _parse(PlanConfig, f"plan {recipe}", rest)
    _quieten_libraries()
    from recsys.planning.plan import plan

    plan(recipe, config)
    return 0


def _named(arguments: list[str], kind: type, verb: str) -> tuple[str, list[str]]:
    """The recipe that a verb's arguments begin with, and the others; help needs no recipe."""
    if arguments[:1] in (["-h"], ["--help"]):
        _parse(kind, f"{verb} RECIPE", arguments)
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"{verb}: name a RECIPE first, as after `recsys train`")
    return arguments[0], arguments[1:]


def _study(arguments: list[str]) -> int:
    return _run("study", STUDY_VERBS, arguments)


def _study_merge(arguments: list[str]) -> int:
    from recsys.studies.config import MergeStudyConfig

    recipe, rest = _named(arguments, MergeStudyConfig, "study merge")
    config = _parse(MergeStudyConfig, f"study merge {recipe}", rest)
    _quieten_libraries()
    from recsys.recipes import find_recipe
    from recsys.studies.merge_study import merge_study

    merge_study(config, find_recipe(recipe))
    return 0


def _study_compression(arguments: list[str]) -> int:
    from recsys.studies.compression.config import CompressionStudyConfig

    recipe, rest = _named(arguments, CompressionStudyConfig, "study compression")
    config = _parse(CompressionStudyConfig, f"study compression {recipe}", rest)
    _quieten_libraries()
    from recsys.recipes import find_recipe
    from recsys.studies.compression.study import compression_study

    compression_study(config, find_recipe(recipe))
    return 0


def _sweep(arguments: list[str]) -> int:
    from recsys.studies.sweep.config import SweepConfig

    recipe, rest = _named(arguments, SweepConfig, "sweep")
    end = rest.index("--") if "--" in rest else len(rest)
    config = _parse(SweepConfig, f"sweep {recipe}", rest[:end])
    _quieten_libraries()
    from recsys.recipes import find_recipe
    from recsys.training.config import TrainConfig

    base = _parse(TrainConfig, f"sweep {recipe} ... --", rest[end + 1 :], default=find_recipe(recipe))
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise InputError("sweep needs the package optuna; pip install 'recsys[sweep]'") from None
    from recsys.studies.sweep.search import sweep

    sweep(config, base)
    return 0


def _shard_bench(arguments: list[str]) -> int:
    from recsys.studies.shard_config import ShardBenchConfig

    config = _parse(ShardBenchConfig, "shard-bench", arguments)
    _quieten_libraries()
    from recsys.studies.shard_bench import shard_bench

    shard_bench(config)
    return 0


def _bench(arguments: list[str]) -> int:
    return _run("bench", BENCH_VERBS, arguments)


def _bench_compare(arguments: list[str]) -> int:
    from recsys.reporting.bench import CompareConfig, bench_compare

    config = _parse(CompareConfig, "bench compare", arguments)
    fallen = bench_compare(config)
    if fallen:
        print(*fallen, sep="\n", file=sys.stderr)
    return 1 if fallen else 0


def _backbones(arguments: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from recsys.ladder import LadderConfig, rungs

    config = _parse(LadderConfig, "backbones", arguments)
    table = Table(title=f"{config.num_fields} fields of {config.embedding_dim}, default sizes and larger")
    for column in ("backbone", "along", "rung"):
        table.add_column(column)
    table.add_column("parameters", justify="right")
    table.add_column("FLOPs a row", justify="right")
    for rung in rungs(config):
        along = "" if rung.k == 1 else rung.along
        table.add_row(rung.backbone, along, f"{rung.k:g}", f"{rung.num_parameters:,}", f"{rung.flops:,}")
    Console().print(table)
    return 0


def _doctor(arguments: list[str]) -> int:
    from recsys.doctor import diagnose

    if arguments:
        print("usage: recsys doctor\n\nChecks that the environment works, and says what mends it.")
        return 0 if arguments[0] in ("-h", "--help") else 2
    checks = diagnose()
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<10} {check.found}")
        if not check.ok:
            print(f"                 mend it: {check.remedy}")
    return 0 if all(check.ok for check in checks) else 1


def _print_metrics(title: str, metrics: "Mapping[str, ClickMetrics]") -> None:
    from rich.console import Console
    from rich.table import Table

    rows = next(iter(metrics.values())).num_rows
    table = Table(title=f"{title}, {rows:,} rows", title_justify="left")
    table.add_column("member")
    with_groups = any(member.gauc is not None for member in metrics.values())
    for column in ("AUC", *(["GAUC"] if with_groups else []), "logloss", "NE", "calibration"):
        table.add_column(column, justify="right")
    for name, member in metrics.items():
        ranked = (member.auc, member.gauc) if with_groups else (member.auc,)
        values = (*ranked, member.logloss, member.ne, member.calibration)
        table.add_row(name, *("" if value is None else f"{value:.5f}" for value in values))
    Console().print(table)


def _print_groups(by: str, found: "Grouped") -> None:
    """Print the rows of the most frequent ids of a feature, one a line."""
    from rich.console import Console
    from rich.table import Table

    title = f"merged, by {by}: {found.num_groups:,} groups; those with both labels have {found.share:.1%} of the weight"
    table = Table(title=title, title_justify="left")
    table.add_column("id")
    for column in ("rows", "AUC", "logloss", "NE", "calibration"):
        table.add_column(column, justify="right")
    for value, group in found.segments.items():
        metrics = (group.auc, group.logloss, group.ne, group.calibration)
        table.add_row(str(value), f"{group.num_rows:,}", *(f"{metric:.5f}" for metric in metrics))
    Console().print(table)


def _quieten_libraries() -> None:
    """Leave out what torch and torchrec tell their own developers at every start."""
    import logging

    for message in (
        "Please use DTensor instead",
        ".*broadcast_buffers. is deprecated",
        ".*torch.distributed.*is deprecat",
    ):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # Of tables whose optimizer is not fused on a CPU; there is a kernel for their gradients.
    warnings.filterwarnings("ignore", message=".*dense_embedding_codegen_lookup_function", category=UserWarning)
    # The pipeline's: that ids which are split or mapped on the way to a table are not sent ahead.
    for name in ("torch.fx._symbolic_trace", "torchrec.distributed.train_pipeline"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
