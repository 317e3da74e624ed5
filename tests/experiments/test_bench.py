"""The benchmarks take times in balanced orders, and measure what their names say."""

import collections
import itertools
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments._variants import with_norm
from experiments.bench import _timing as timing
from experiments.bench import ws
from experiments.bench.__main__ import main
from experiments.bench.data import data_rows, write_jpegs
from experiments.bench.detection import Detection
from experiments.bench.step import Step, step_rows, training_call
from experiments.recipes import get_recipe

RECIPE = "digits_resnet8_bcn_ws"
FIGURES = {"median_ms", "spread"}


@pytest.mark.parametrize(("count", "rounds"), [(2, 2), (5, 10), (12, 12), (1, 3)])
def test_orders_balance_places_and_predecessors(count, rounds):
    orders = [timing.balanced_order(count, index) for index in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    places = collections.Counter(pair for order in orders for pair in enumerate(order))
    pairs = collections.Counter(pair for order in orders for pair in itertools.pairwise(order))
    assert len(set(places.values())) == 1
    assert len(places) == count * count
    assert len(set(pairs.values())) <= 1
    assert len(pairs) == count * (count - 1)


def test_every_call_is_timed_alone_and_warmed_up_before():
    now, ran = 0.0, []

    def work(key, seconds):
        nonlocal now
        now += seconds
        ran.append(key)

    durations = {("a", "forward"): 1.0, ("b", "forward"): 2.0, ("c", "forward"): 4.0}
    calls = {key: lambda key=key, s=s: work(key, s) for key, s in durations.items()}
    seconds = timing.interleaved_seconds(calls, rounds=6, clock=lambda: now)
    for key, duration in durations.items():
        np.testing.assert_array_equal(seconds[key], np.full(6, duration))
    assert ran[:6] == [key for key in calls for _ in range(2)]
    assert all(set(ran[start : start + 3]) == set(calls) for start in range(6, 24, 3))


def test_quick_never_adds_rounds():
    assert Step(quick=True).rounds == 3
    assert Step(quick=True, repeats=2).rounds == 2
    assert Step(repeats=7).rounds == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 0}, r"repeats must be at least 1, received 0"),
        ({"recipe": "digits_resnet8_bn", "against": "torch"}, r"only ResNet-50, .* digits_resnet8"),
    ],
)
def test_options_refuse_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        Step(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "resnet50"], "A recipe is named"),
        (["--norms", "batch_ws"], "received 'batch_ws'"),
        (["--recipe", RECIPE, "--batch", "2", "--micro", "4"], "whole number of micro-batches"),
    ],
)
def test_an_error_is_one_line_before_measuring(arguments, message, capsys, monkeypatch):
    monkeypatch.delattr(timing, "interleaved_seconds")
    assert main(["step", *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", ["layers", "ws", "step", "data", "detection"])
def test_a_file_that_cannot_be_written_fails_before_measuring(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.delattr(timing, "interleaved_seconds")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below.json"):
        assert main([command, "--json", str(path)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert "--json must name a file that can be written" in error


def test_looking_at_the_path_changes_no_file(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(timing, "interleaved_seconds", interrupt)
    monkeypatch.setattr(ws, "resnet50_kernels", lambda: [(1, 1, 4, 4)])
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept")
    for path in (old, new):
        assert main(["ws", "--json", str(path)]) == 130
    assert old.read_text() == "kept"
    assert not new.exists()


def test_calls_of_a_step_go_on_from_the_last_state(tiny_network):
    call = training_call(with_norm(get_recipe(RECIPE), "bn"), 8, 2)
    losses = []
    for step in range(1, 4):
        state, metrics = call()
        assert int(state.step) == step
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert len(set(losses)) == 3
    assert ws.kernel_shapes(state.params) == [
        (3, 3, 4, 8),
        (3, 3, 8, 8),
        (1, 1, 4, 8),
        (7, 7, 1, 4),
    ]
    assert len(jax.tree.leaves(state.params)[0].devices()) == 1


def test_figures_compare_steps_of_the_same_round():
    seconds = {
        # All calls were ten times slower in the third round.
        ("bn", "step"): np.array([1.0, 1.0, 10.0]),
        ("bcn", "step"): np.array([2.0, 2.0, 20.0]),
        ("bcn_ws", "step"): np.array([2.5, 2.5, 25.0]),
    }
    ratios = {row["norm"]: row["ratio_to_batchnorm"] for row in step_rows(seconds)}
    assert ratios == {"bn": 1, "bcn": 2, "bcn_ws": 2.5}
    alone = {("ws_alone", "step"): np.array([0.25, 0.25, 2.5])}
    added = step_rows(seconds | alone)[-1]
    expected = {"norm": "ws_added", "ratio_to_batchnorm": 0.5, "median_ms": 500}
    expected |= {"ratio_to_ws_alone": 2, "ratio_to_bcn_ws": 0.2}
    assert {key: added[key] for key in expected} == expected


def test_step_writes_its_figures(tmp_path, capsys, tiny_network):
    path = tmp_path / "step.json"
    arguments = ["--quick", "--repeats", "1", "--batch", "2", "--micro", "1"]
    assert main(["step", *arguments, "--norms", "bcn", "bcn_ws", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [row["norm"] for row in rows] == ["bn", "bcn", "bcn_ws", "ws_alone", "ws_added"]
    references = {f"ratio_to_{name}" for name in ("batchnorm", "bcn_ws", "ws_alone")}
    assert all(set(row) == {"norm"} | references | FIGURES for row in rows)
    printed = capsys.readouterr().out
    assert f"{RECIPE}'s network, 2 images a step" in printed
    assert "ws_added" in printed


def test_files_are_as_large_as_photographs_in_imagenets_layout(tmp_path):
    write_jpegs(tmp_path, 3)
    for split in ("train", "val"):
        files = sorted((tmp_path / "imagenet" / split).glob("n*/*.JPEG"))
        assert len(files) == 3
        assert 80e3 < np.mean([file.stat().st_size for file in files]) < 100e3
        for file in files:
            with Image.open(file) as image:
                assert 450 <= image.width <= 550
                assert 337 <= image.height <= 413


def test_images_per_second_are_of_the_median_pass():
    (row,) = data_rows({("train", 2): np.array([2.0, 2.0, 100.0])}, {("train", 2): 10})
    assert row["images_per_second"] == 5
    assert row["threads"] == 2


def test_data_writes_its_rows(tmp_path, data_dir):
    pytest.importorskip("cv2", reason="decoding JPEG files needs the extra jpeg")
    path = tmp_path / "data.json"
    options = {"in-memory": "digits", "jpegs": 8, "batch": 6, "repeats": 1, "image-size": 32}
    arguments = [str(item) for name, value in options.items() for item in (f"--{name}", value)]
    assert main(["data", *arguments, "--threads", "0", "2", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["pipeline"], row["threads"], row["images"]) for row in rows] == [
        ("digits_train", 1, 1434),
        *(
            (name, threads, n)
            for threads in (0, 2)
            for name, n in (("jpeg_train", 6), ("jpeg_eval", 8))
        ),
    ]
    keys = {"pipeline", "threads", "images", "images_per_second"} | FIGURES
    assert all(set(row) == keys for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jpegs", "2", "--batch", "4", "--threads", "-1"], "threads must be at least 0"),
        (["--jpegs", "2", "--image-size", "257"], "received 257 and 256"),
    ],
)
def test_data_refuses_what_the_pipeline_refuses(arguments, message, data_dir, capsys):
    assert main(["data", *arguments, "--in-memory", "digits"]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_detection_writes_its_rows(tmp_path):
    path = tmp_path / "detection.json"
    arguments = ["--repeats", "1", "--boxes", "8", "--regions", "4", "--feature-map", "4", "6", "2"]
    assert main(["detection", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["operation"], row["form"], row["pass"]) for row in rows] == [
        ("nms of 8", "ours", "forward"),
        *(
            (f"roi_align {bins}x{bins}", form, which)
            for bins in (7, 14)
            for form in ("gather", "einsum")
            for which in ("forward", "forward_backward")
        ),
    ]
    with pytest.raises(ValueError, match="must be positive, received"):
        Detection(regions=0)
