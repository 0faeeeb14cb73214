import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import recsys
from recsys import cli
from recsys.cli import main
from recsys.config import InputError
from recsys.training.config import LoopConfig


def recsys_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "recsys", *arguments], capture_output=True, text=True, check=False)


def error_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with 2 and one line on stderr; returns that line."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("recsys: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err.removeprefix("recsys: ").removesuffix("\n")


@pytest.mark.parametrize("arguments", [["--help"], ["synth", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_polars(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from recsys.cli import main\n"
        "try:\n"
        f"    status = main({arguments})\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "heavy = {'torch', 'torchrec', 'polars', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "print(status, heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "0 set()\n"
    assert done.stdout


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for verb, what in cli.VERBS.items():
        assert verb in help_text
        assert what in help_text
        assert callable(getattr(cli, f"_{verb.replace('-', '_')}"))


def test_no_verb_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: recsys VERB")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"recsys {recsys.__version__}\n"


def test_a_process_exits_with_what_main_returns(tmp_path: Path) -> None:
    log = tmp_path / "log.tsv"
    made = recsys_process("synth", "--out", str(log), "--num-rows", "10", "--num-ids", "4")
    assert (made.returncode, log.read_text().count("\n")) == (0, 10)
    again = recsys_process("synth", "--out", str(log), "--num-rows", "10", "--num-ids", "4")
    assert again.returncode == 2
    assert again.stderr.startswith(f"recsys: {log}: exists already")


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert error_line(capsys, "prepar") == "unknown verb 'prepar'; did you mean prepare or report?"


def test_an_unknown_option_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["synth", "--out", "x", "--num-row", "3"])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "--num-row" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["synthetik"], "unknown recipe 'synthetik'; did you mean synthetic?"),
        (["synthetic", "--members", "dcnv3"], "unknown backbone 'dcnv3'; did you mean dcn"),
        (["synthetic", "--members", "dcnv2*"], "member 'dcnv2*' is neither NAME nor NAME*COUNT"),
        (["synthetic", "--merge", "mean"], "unknown merge rule 'mean'; did you mean mean_logit"),
        (["synthetic", "--compression", "0.5"], "compression 0.5 must be a finite number of at least 1"),
        (["synthetic", "--optimizer.dense-lr", "-1"], "dense_lr -1.0 must be 0 or more"),
        (["no_such_module:make"], "recipe 'no_such_module:make': no module 'no_such_module' in "),
        (["recsys.recipes:criteo"], "recipe 'recsys.recipes:criteo': recsys/recipes/__init__.py has no 'criteo'; did"),
        (["os:getcwd"], "recipe 'os:getcwd': <built-in function getcwd>: returns str instead of TrainConfig"),
        (["no_such.yaml"], "no_such.yaml: cannot read it (No such file or directory)"),
    ],
)
def test_train_names_what_is_wrong(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert error_line(capsys, "train", *arguments).startswith(message)


@pytest.mark.parametrize("arguments", [["predict", "run"], ["merge", "one.parquet", "two.parquet"]])
def test_predictions_are_not_called_csv(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in arguments[1:]:
        Path(name).touch()
    told = error_line(capsys, *arguments, "--out", "test/pred.csv")
    assert told == "--out test/pred.csv: predictions are written as Parquet; call it test/pred.parquet"


def test_more_parts_than_a_rank_has_rows_are_refused() -> None:
    loop = LoopConfig(batch_size=512, accumulate=200)
    with pytest.raises(InputError, match="accumulate 200: a rank has 128 rows of a batch of 512 on 4 ranks"):
        loop.check_parts(4)


def test_only_the_first_rank_of_a_job_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train", "synthetic", "--members", "dcnv3"]) == 2
    assert capsys.readouterr() == ("", "")


def test_train_help_lists_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    help_text = capsys.readouterr().out
    assert "criteo_kaggle" in help_text
    assert "synthetic" in help_text


def test_ctrl_c_stops_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "recsys", "synth", "--out", str(tmp_path / "log.tsv"), "--num-rows", "1000000000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            # The log lies beside its final name once work has begun.
            for _ in range(1200):
                if any(tmp_path.iterdir()) or process.poll() is not None:
                    break
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
