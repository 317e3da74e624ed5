import functools
import json

import pytest

from experiments import _models, compare
from experiments.compare import Result, spread
from wsbcn_flax import models
from wsbcn_flax._folder_lock import lock_folder


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("WSBCN_FLAX_DATA_DIR", str(tmp_path / "data"))


def test_writes_table_json_and_figure(tmp_path, capsys, monkeypatch):
    # One block would not distinguish batch from batch-channel normalization; three do.
    narrow = functools.partial(models.CifarResNet, depth=8, width=4)
    monkeypatch.setitem(_models.MODELS, "resnet8", narrow)
    out = tmp_path / "out"
    arguments = ["--data", "digits", "--norms", "bn", "bcn_ws", "--micro-batches", "2", "64"]
    arguments += ["--seeds", "0", "--epochs", "1.1", "--out", str(out)]
    assert compare.main(arguments) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [(run["norm"], run["micro_batch"]) for run in runs] == [
        ("bn", 2),
        ("bn", 64),
        ("bcn_ws", 2),
        ("bcn_ws", 64),
    ]
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "BCN+WS" in printed
    assert "micro-batch 64" in printed
    # BCN's training does not depend on the split: losses differ only by accumulated rounding.
    bn, bcn = runs[:2], runs[2:]
    assert abs(bcn[0]["test_loss"] - bcn[1]["test_loss"]) < 0.01
    assert abs(bn[0]["test_loss"] - bn[1]["test_loss"]) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--micro-batches", "3"], "must divide the batch of 64, received 3"),
        (["--norms", "xn"], "A recipe is named"),
        (["--data", "cifar10", "--model", "resnet20"], "DatasetNotFoundError"),
        (["--data", "scenes", "--model", "mask_rcnn_tiny"], "tasks that have a test error"),
    ],
)
def test_errors_come_before_the_first_run(arguments, message, tmp_path, capsys):
    assert compare.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(tmp_path, capsys):
    arguments = ["--norms", "bn", "--micro-batches", "64", "--out", str(tmp_path / "out")]
    with lock_folder(tmp_path / "out"):
        assert compare.main(arguments) == 1
    assert "is in use by process" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_refuses_to_compare_nothing():
    with pytest.raises(ValueError, match="seeds must name at least one"):
        compare.CompareOptions(seeds=())


def test_spread_is_in_percent():
    results = [Result("bn", 1, seed, error, 0.0) for seed, error in enumerate([0.1, 0.2, 0.6])]
    results.append(Result("bn", 2, 0, 0.9, 0.0))
    assert spread(results, "bn", 1) == pytest.approx((30.0, 10.0, 60.0))
