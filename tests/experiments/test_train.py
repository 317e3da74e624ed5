import json
import subprocess
import sys

import jax
import pytest

from experiments import train
from experiments.crash import CrashOptions, crash
from wsbcn_flax.data import default_data_dir
from wsbcn_flax.training.writers import read_jsonl

pytestmark = pytest.mark.usefixtures("data_dir")

RECIPE = ["digits_resnet8_bcn_ws", "--model.width", "8", "--epochs", "4"]
RECIPE += ["--optim.learning-rate", "0.3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("run")
    arguments = [*RECIPE, "--out", str(folder), "--no-progress"]
    assert train.main([*arguments, "--eval-every", "30", "--tensorboard"]) == 0
    return folder


def test_learns_digits(trained):
    """The error is eight times better than chance after four epochs on eight devices."""
    result = json.loads((trained / "result.json").read_text())
    assert result["eval_error"] < 0.9 / 8
    losses = [record["loss"] for record in read_jsonl(trained / "metrics.jsonl")]
    assert losses[-1] < losses[0] / 2
    assert any((trained / "tensorboard").iterdir())


def test_finished_run_is_not_trained_again(trained, capsys):
    before = (trained / "metrics.jsonl").read_text()
    assert train.main([*RECIPE, "--out", str(trained), "--no-progress"]) == 0
    assert (trained / "metrics.jsonl").read_text() == before
    assert "eval_error" in capsys.readouterr().out


def test_a_batch_of_no_image_is_an_error_of_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["digits_resnet8_bn", "--batch.size", "0"])
    assert "batch.size must be at least 1, received 0" in capsys.readouterr().err


def test_help_ends_quietly_where_nobody_reads_on():
    command = f"{sys.executable} -m experiments.train --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_another_recipes_folder_is_refused(trained, capsys):
    arguments = ["digits_resnet8_bn", "--out", str(trained), "--no-progress"]
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "norm.kind 'bcn' -> 'bn'" in error
    assert "optim.learning_rate 0.3 -> 0.1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3", "digits_resnet8_bn"], "The name of the recipe comes first"),
        (["digits_resnet9_bn"], "Did you mean digits_resnet8_bn"),
        (["cifar10_resnet110_bn"], "DatasetNotFoundError"),
        (["digits_resnet8_bn", "--model.name", "resnet9"], "model.name must be one of"),
        (["digits_resnet8_ln", "--optim.learning-rate", "1e30"], "NonFiniteLossError"),
        (["digits_resnet8_ln", "--epochs", "1"], "Train longer, or lower optim.warmup_epochs"),
        (["digits_resnet8_bn", "--seed", "-1"], "seed must be at least 0, received -1"),
        (["digits_resnet8_bn", "--batch.compiler-options", "foo", "bar"], "No such compile option"),
    ],
)
@pytest.mark.usefixtures("tiny_network")
def test_errors_are_one_line(arguments, message, tmp_path, capsys):
    assert train.main([*arguments, "--out", str(tmp_path), "--no-progress"]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lerning-rate", "1"], "--optim.learning-rate"),
        (["--norm.groups", "-1"], "norm.groups must be at least 1, received -1"),
        (["--model.width", "0"], "model.width must be at least 1, received 0"),
        (["--optim.schedule", "step", "--optim.milestones", "2", "1"], "must be positive epochs"),
    ],
)
def test_wrong_options_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(["digits_resnet8_bn", *arguments])
    assert message in capsys.readouterr().err


def test_other_errors_keep_their_traceback_and_open_the_debugger(monkeypatch, tmp_path, capsys):
    def broken(self):
        return {}["own"]

    monkeypatch.setattr("experiments._classification.ClassificationRecipe.load_data", broken)
    arguments = ["digits_resnet8_bn", "--out", str(tmp_path)]
    with pytest.raises(KeyError, match="own"):
        train.main(arguments)
    entered = []
    monkeypatch.setattr("pdb.post_mortem", entered.append)
    assert train.main([*arguments, "--pdb"]) == 1
    assert "KeyError: 'own'" in capsys.readouterr().err
    assert len(entered) == 1


def test_help_names_every_recipe_on_two_screens(capsys):
    assert train.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) < 48
    for part in ("digits", "wrn28_10", "bcn", "cwn", "imagenet_resnet50_gn_ws", "23.72 %"):
        assert part in printed


@pytest.mark.parametrize("own", [None, "of_the_user"])
def test_programs_are_kept_for_the_next_command(own):
    """Compiled programs are kept beside the data, unless JAX's option names another folder."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", own)
    try:
        assert train.main(["digits_resnet9_bn"]) == 1
        kept = jax.config.jax_compilation_cache_dir
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert kept == (own or str(default_data_dir().parent / "compiled"))


@pytest.mark.usefixtures("tiny_processes")
def test_killed_and_resumed_equals_undisturbed(tmp_path):
    """A short version of `python -m experiments.crash`."""
    options = CrashOptions(
        recipe="digits_resnet8_bcn_ws", kills=1, epochs=3, checkpoint_every=10, devices=2, seed=1
    )
    report = crash(options, tmp_path)
    assert report.killed_at
    # A checkpoint may still be written during the steps up to the next one.
    assert max(report.lost) <= 2 * options.checkpoint_every
    assert report.leaves > 50
    assert report.differing == ()
    assert report.same_metrics
