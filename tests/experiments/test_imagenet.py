"""ImageNet recipes train and evaluate on folders of JPEG files."""

import json

import pytest
from PIL import Image

from experiments import evaluate, predict, train

CLASSES = ("n01440764", "n01443537")
COLORS = ("red", "blue")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 8), ("val", 3)):
        for name, color in zip(CLASSES, COLORS, strict=True):
            (root / "imagenet" / split / name).mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", (50 + index, 40), color)
                image.save(root / "imagenet" / split / name / f"{name}_{index}.JPEG")
    return root


def test_trains_evaluates_and_predicts(folder, tmp_path, capsys):
    run = tmp_path / "run"
    options = {
        "model.name": "resnet8",  # A fast network, since only the data are tested.
        "norm.groups": 4,
        "data.data-dir": folder,
        "data.image-size": 32,
        "data.resize": 36,
        "batch.size": 8,
        "batch.devices": 1,
        "epochs": 4,
        "optim.learning-rate": 0.01,
        "out": run,
    }
    arguments = [str(item) for name, value in options.items() for item in (f"--{name}", value)]
    assert train.main(["imagenet_resnet18_gn_ws", *arguments, "--no-progress"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["eval_error"] <= 1
    assert evaluate.main([str(run), "--json", str(tmp_path / "metrics.json")]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["error"] == result["eval_error"]
    capsys.readouterr()
    image = folder / "imagenet" / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG"
    assert predict.main([str(run), str(image), "--top", "2"]) == 0
    assert set(CLASSES) <= set(capsys.readouterr().out.split())
