"""A run is evaluated on data that it fits, by the model that was trained, from a checkpoint that has not changed."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from recsys.config import InputError
from recsys.data.prepare import PrepareConfig, prepare
from recsys.data.synthetic import SynthConfig, synthesize
from recsys.distributed import process_group
from recsys.training.checkpoint.config import WarmStartConfig
from recsys.training.checkpoint.warm_start import warm_start
from recsys.training.config import TrainConfig
from recsys.training.predict import Predictor
from recsys.training.provenance import check_labels, data_facts, difference
from recsys.training.trainer import Trainer
from tests.distributed.jobs import small_config

SEED = 2021


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so few ids that every split has the same vocabulary."""
    path = tmp_path_factory.mktemp("raw") / "log.tsv"
    synthesize(SynthConfig(out=path, num_rows=3_000, num_ids=4))
    return path


def prepare_log(log: Path, out: Path, *, seed: int = SEED, threshold: int = 1) -> Path:
    prepare(PrepareConfig(format="criteo_kaggle", paths=(log,), out=out, threshold=threshold, seed=seed))
    return out


@pytest.fixture(scope="module")
def config(log: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Of a run that was trained."""
    folder = tmp_path_factory.mktemp("provenance")
    data = prepare_log(log, folder / "data")
    config = small_config(data, out=folder / "run", members=("dcnv2",), num_steps=3)
    with process_group() as world:
        torch.set_num_threads(1)
        Trainer(config, world).train()
    return config


def open_run(run: Path, data: Path | None = None) -> None:
    with process_group() as world:
        Predictor(run, world, data=data).predict("test")


def test_another_split_of_the_same_log_is_refused(config: TrainConfig, log: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"another split of the log .*: seed 7 instead of 2021; rows that are"):
        open_run(config.out, prepare_log(log, tmp_path / "data", seed=7))
    open_run(config.out, prepare_log(log, tmp_path / "again"))


def test_ids_of_another_vocabulary_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    """Though all tables are as large."""
    synthesize(SynthConfig(out=tmp_path / "other.tsv", num_rows=3_000, num_ids=4, seed=5))
    data = prepare_log(tmp_path / "other.tsv", tmp_path / "data")
    assert data_facts(data)["schema"] == data_facts(config.data)["schema"]
    changed = difference(data_facts(config.data), data_facts(data))
    assert changed is not None
    with pytest.raises(InputError, match=r"ids of feature C\d+ are of another vocabulary; prepare it by --like"):
        open_run(config.out, data)


def test_tables_of_another_vocabulary_stay_fresh(config: TrainConfig, tmp_path: Path) -> None:
    synthesize(SynthConfig(out=tmp_path / "other.tsv", num_rows=3_000, num_ids=4, seed=5))
    data = prepare_log(tmp_path / "other.tsv", tmp_path / "data")
    with process_group() as world:
        trainer = Trainer(dataclasses.replace(config, data=data), world)
        found = warm_start(WarmStartConfig(path=config.out), trainer.task, trainer.optimizer, data)
    mine, theirs = (data_facts(folder)["vocabulary"] for folder in (data, config.data))
    others = {
        f"ids of {feature} are of another vocabulary there" for feature in mine if mine[feature] != theirs[feature]
    }
    assert others
    assert set(found.fresh.values()) == others
    assert len(found.fresh) == len(others)


def test_another_log_is_predicted_by_the_ids_of_the_first(config: TrainConfig, tmp_path: Path) -> None:
    other, data = tmp_path / "other.tsv", tmp_path / "data"
    synthesize(SynthConfig(out=other, num_rows=500, num_ids=4, seed=5))
    prepare(PrepareConfig(format="criteo_kaggle", paths=(other,), out=data, like=config.data))
    with process_group() as world:
        predictions = Predictor(config.out, world, data=data).predict("test")
    assert predictions is not None
    assert len(predictions.logits_NM) == 500


def test_a_run_that_knew_less_of_its_data_is_opened(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.out, run)
    facts = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({key: facts[key] for key in facts if key not in ("log", "vocabulary")}))
    open_run(run)


def test_a_config_that_was_changed_since_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(config.out, run)
    text = (run / "config.json").read_text()
    assert '"num_cross_layers": 2' in text
    (run / "config.json").write_text(text.replace('"num_cross_layers": 2', '"num_cross_layers": 1'))
    with pytest.raises(InputError, match=r"config.json: member dcnv2 is not the one in .*step-00000003"):
        open_run(run)


def test_a_checkpoint_that_has_changed_since_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    """Though by a bit of one weight, with which it would load."""
    run = tmp_path / "run"
    shutil.copytree(config.out, run)
    with process_group() as world:
        weight = next(iter(Predictor(run, world).task.module.model.members.parameters()))
    bytes_of_row = weight[0].detach().numpy().tobytes()
    (file,) = [file for file in run.rglob("*.distcp") if bytes_of_row in file.read_bytes()]
    values = bytearray(file.read_bytes())
    values[values.index(bytes_of_row)] ^= 1
    file.write_bytes(values)
    with pytest.raises(InputError, match=r"distcp has changed since it was written.*damaged"):
        open_run(run)


def test_a_member_that_predicts_no_number_is_refused(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with process_group() as world:
        predictor = Predictor(config.out, world)
        parameter = next(value for name, value in predictor.task.named_parameters() if "head" in name)
        with torch.no_grad():
            parameter.fill_(float("nan"))
        with pytest.raises(InputError, match="member dcnv2 predicts no number for rows of test; it diverged"):
            predictor.predict("test")


def test_labels_of_one_kind_teach_nothing(config: TrainConfig, tmp_path: Path) -> None:
    check_labels(config.data)
    check_labels(tmp_path)  # no manifest
    splits = {"train": {"num_rows": 1200, "label_mean": 0.0}}
    (tmp_path / "manifest.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(InputError, match="all 1,200 rows of train have label 0, so there is nothing to learn"):
        check_labels(tmp_path)
