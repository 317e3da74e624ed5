"""Detection recipes, and the commands on a small dataset in COCO's format."""

import json

import jax
import pytest
from coco_files import coco_content, write_coco

from experiments import detect, predict, train
from experiments.recipes import PUBLISHED, get_recipe
from wsbcn_flax.models.detection import MaskRCNN

BACKBONES = ("r50", "r101", "x50", "x101")
ROWS = [f"coco_{kind}_rcnn_{b}_gn_ws" for kind in ("faster", "mask") for b in BACKBONES]


def test_every_published_row_has_a_recipe():
    assert {name for name in PUBLISHED if name.startswith("coco")} == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_published_schedules_are_whole_steps(name):
    recipe = get_recipe(name)
    per_epoch = 117_266 // recipe.batch.size
    assert recipe.batch.size == (8 if "50" in name else 4)
    assert recipe.optim.learning_rate == 0.00125 * recipe.batch.size
    steps = [recipe.epochs * per_epoch, *(m * per_epoch for m in recipe.optim.milestones)]
    assert [round(step) for step in steps] == pytest.approx(steps, abs=1e-6)
    per_image = {"faster": (180, 120, 160), "mask": (360, 300, 340)}[name.split("_")[1]]
    assert [step * recipe.batch.size / 8000 for step in steps] == pytest.approx(per_image)


def test_the_published_detector_has_the_authors_size():
    experiment = get_recipe("coco_mask_rcnn_r50_gn_ws").experiment()
    params = jax.eval_shape(lambda: experiment.init(0)).params
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 45_715_509
    standardized = experiment.transform.paths(params)
    assert len(standardized) == 69
    assert not [path for path in standardized if path.startswith("rpn")]
    assert isinstance(experiment.task.model, MaskRCNN)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return write_coco(folder, coco_content(4, sizes=((64, 64), (48, 64))))


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A detector trained for two steps on four images."""
    files = {"annotations": dataset, "images": dataset.parent / "images"}
    options = {
        **{f"data.{prefix}{k}": v for prefix in ("", "eval-") for k, v in files.items()},
        "data.buckets": "64 64",
        "data.shorter": 64,
        "data.longer": 64,
        "model.features": 16,
        "model.hidden": 32,
        "model.regions": 16,
        "model.anchors": 16,
        "model.proposals": "32 16",
        "batch.size": 2,
        "batch.devices": 1,
        "epochs": 1,
        "optim.warmup-epochs": 0,
        "out": tmp_path_factory.mktemp("run"),
    }
    words = [word for k, v in options.items() for word in (f"--{k}", *str(v).split())]
    assert train.main(["scenes_mask_rcnn_tiny_gn_ws", *words, "--no-progress"]) == 0
    return options["out"]


def test_a_run_is_trained_and_scored(run):
    result = json.loads((run / "result.json").read_text())
    assert {"eval_box_AP", "eval_mask_AP"} <= set(result)
    facts = json.loads((run / "data.json").read_text())
    assert facts == {"train_size": 4, "class_names": ["background", "square", "triangle", "L"]}


def test_commands_take_the_run(run, dataset, tmp_path):
    image = dataset.parent / "images" / "1.png"
    figure, found = tmp_path / "figure.png", tmp_path / "found.json"
    options = ["--threshold", "0", "--figure", str(figure), "--json", str(found)]
    assert detect.main([str(run), str(image), *options]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    for each in json.loads(found.read_text()):
        x, y, width, height = each["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 64.01
        assert y + height <= 48.01
        assert each["segmentation"]["size"] == [48, 64]
        assert each["category"] in ("square", "triangle", "L")
    assert predict.main([str(run), str(image), "--top", "2"]) == 0


def test_a_missing_dataset_says_how_to_get_it(tmp_path, capsys):
    arguments = ["scenes_mask_rcnn_tiny_gn_ws", "--data.data-dir", str(tmp_path)]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "python -m experiments.scenes" in error
    assert len(error.splitlines()) == 1
