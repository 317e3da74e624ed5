"""What all measurements share: files that can be written, and options that mean something."""

import json

import pytest

from experiments import bench
from experiments._bench import data, layers, memory, step, tpu, weights
from experiments._bench.options import TimedOptions

RUNS = [
    (layers, layers.run_layers, layers.Layers),
    (weights, weights.run_weight_standardization, weights.WeightStandardization),
    (step, step.run_step, step.Step),
    (memory, memory.run_memory, memory.Memory),
    (data, data.run_data, data.Data),
    (tpu, tpu.run_ahead_of_time, tpu.AheadOfTime),
]


@pytest.mark.parametrize(("module", "run", "config"), RUNS)
def test_a_file_that_cannot_be_written_fails_before_measuring(
    module, run, config, tmp_path, console, monkeypatch
):
    def measure(*_, **__):
        raise AssertionError("measured before looking at the path")

    for name in ("interleaved_seconds", "compile_steps", "TrainingCall", "load_split"):
        monkeypatch.setattr(module, name, measure, raising=False)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below.json"):
        with pytest.raises(OSError, match=r"--json must name a file that can be written"):
            run(config(json=path), console)


def test_looking_at_the_path_changes_no_file(tmp_path, console, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "interleaved_seconds", interrupt)
    monkeypatch.setattr(weights, "resnet50_kernels", lambda: [(1, 1, 4, 4)])
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("kept")
    for path in (old, new):
        with pytest.raises(KeyboardInterrupt):
            weights.run_weight_standardization(weights.WeightStandardization(json=path), console)
    assert old.read_text() == "kept"
    assert not new.exists()


def test_quick_never_adds_rounds():
    assert TimedOptions(quick=True).rounds == 3
    assert TimedOptions(quick=True, repeats=2).rounds == 2
    assert TimedOptions(repeats=7).rounds == 7


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (TimedOptions, {"repeats": 0}, r"repeats must be at least 1, received 0"),
        (step.Step, {"repeats": 0}, r"repeats must be at least 1, received 0"),
        (step.Step, {"batch": 0}, r"image_size and batch must be at least 1, received 128 and 0"),
        (step.Step, {"norms": ("bcn",)}, r"norms must name bn, .* received bcn"),
        (step.Step, {"norms": ("bn", "batch_ws")}, r"A normalization is .* received 'batch_ws'"),
        (step.Step, {"recipe": "resnet50"}, r"A recipe is named"),
        (
            step.Step,
            {"recipe": "digits_resnet8_bn", "against": "torch"},
            r"ResNet-50 alone .* received the recipe digits_resnet8_bn",
        ),
        (step.Step, {"norms": ("bn",), "against": "torch"}, r"compares with gn_ws"),
        (memory.Memory, {"micro_batches": ()}, r"micro_batches must be numbers"),
        (memory.Memory, {"micro_batches": (1, 0)}, r"at least 1, received \(1, 0\)"),
        (memory.Memory, {"norms": ("gn",)}, r"norms must name bn"),
        (tpu.AheadOfTime, {"per_device_batch": (0,)}, r"per_device_batch must be numbers"),
        (tpu.AheadOfTime, {"against": ("batchnorm",)}, r"A normalization is one of bn"),
        (data.Data, {"in_memory": "imagenet"}, r"in_memory must be one of"),
        (data.Data, {"image_size": 257}, r"image_size must be from 1 to 256, received 257"),
        (data.Data, {"jpegs": 2, "batch": 3}, r"received 3 and jpegs=2"),
        (data.Data, {"threads": (-1,)}, r"threads must be numbers of at least 0"),
    ],
)
def test_config_refuses_what_cannot_be_measured(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_command_runs_what_it_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(weights, "resnet50_kernels", lambda: [(1, 1, 4, 4)])
    path = tmp_path / "ws.json"
    assert bench.main(["ws", "--quick", "--json", str(path)]) == 0
    assert {row["form"] for row in json.loads(path.read_text())} >= {"closed_form", "autodiff"}
    assert "closed_form" in capsys.readouterr().out


def test_an_error_is_one_line_and_a_status(tmp_path, capsys):
    assert bench.main(["ws", "--json", str(tmp_path)]) == 1
    assert "--json must name a file" in capsys.readouterr().err.splitlines()[-1]
