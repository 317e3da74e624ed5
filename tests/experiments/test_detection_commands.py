"""Detection recipes, and commands run with them on a small dataset in COCO's format."""

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from coco_files import CATEGORIES, coco_content, write_coco

from experiments import convert, detect, evaluate, predict, train
from experiments._image_data import PUBLISHED_FACTS
from experiments._model_file import TrainedModel, restore_run
from experiments._recipe import WeightConfig
from experiments.recipes import PUBLISHED, get_recipe
from wsbcn_flax.models.detection import MaskRCNN
from wsbcn_flax.training import Experiment, Program

CATEGORY_IDS = [category["id"] for category in CATEGORIES]
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
def imagenet_weights(tmp_path_factory):
    """A converted ImageNet network whose arrays all hold ones."""
    weight = get_recipe("coco_mask_rcnn_r50_bcn_ws").weight
    recipe = dataclasses.replace(get_recipe("imagenet_resnet50_bcn_ws"), weight=weight)
    state = jax.eval_shape(lambda: recipe.experiment().init(0))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    model = TrainedModel(
        recipe=recipe,
        facts=dataclasses.asdict(PUBLISHED_FACTS["imagenet"]),
        variables=jax.tree.map(lambda x: np.ones(x.shape, x.dtype), variables),
    )
    path = tmp_path_factory.mktemp("weights") / "r50.safetensors"
    model.save(path)
    return path


def _with_weights(name, path, *, caffe=False):
    recipe = get_recipe(name)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, caffe=caffe),
        model=dataclasses.replace(recipe.model, weights=str(path)),
    )


def test_a_backbone_starts_from_imagenet_weights(imagenet_weights):
    recipe = _with_weights("coco_mask_rcnn_r50_bcn_ws", imagenet_weights)
    trained = recipe.trained_variables()
    state = jax.eval_shape(recipe.experiment().init, 0, trained)
    for kind in ("params", "batch_stats"):
        own = getattr(state, kind)["backbone"]
        assert jax.tree.structure(trained[kind]["backbone"]) == jax.tree.structure(own)


def test_weights_of_another_function_are_told(imagenet_weights):
    recipe = _with_weights("coco_mask_rcnn_r50_bcn_ws", imagenet_weights)
    plain = dataclasses.replace(recipe, weight=WeightConfig(kind="none"))
    with pytest.warns(UserWarning, match="Use --weight.kind ws --weight.preset official"):
        plain.trained_variables()


def test_weights_that_do_not_fit_are_refused(imagenet_weights):
    other = _with_weights("coco_mask_rcnn_r50_gn_ws", imagenet_weights)
    with pytest.raises(ValueError, match="of another architecture or normalization"):
        jax.eval_shape(other.experiment().init, 0, other.trained_variables())
    caffe = _with_weights("coco_mask_rcnn_r50_bcn_ws", imagenet_weights, caffe=True)
    with pytest.raises(ValueError, match=r"use --data\.no-caffe"):
        caffe.trained_variables()
    missing = _with_weights("coco_mask_rcnn_r50_bcn_ws", imagenet_weights.parent / "no.safetensors")
    with pytest.raises(FileNotFoundError, match="neither a converted file nor a run"):
        missing.trained_variables()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    return write_coco(folder, coco_content(4, sizes=((64, 64), (48, 64))))


class Run(NamedTuple):
    folder: Path
    arguments: list[str]
    programs: list[Program]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
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
    words += ["--checkpoint-every", "1", "--log-every", "1", "--no-progress"]
    arguments = ["scenes_mask_rcnn_tiny_gn_ws", *words]
    with pytest.MonkeyPatch.context() as patch:
        programs = keep_programs(patch)
        assert train.main(arguments) == 0
    return Run(options["out"], arguments, programs)


def keep_programs(patch, kept=()):
    """Lets equal experiments reuse the first compiled program instead of compiling their own."""
    programs, compile_program = list(kept), Experiment.compile

    def take(experiment):
        if not programs:
            programs.append(compile_program(experiment))
        return programs[0]

    patch.setattr(Experiment, "compile", take)
    return programs


@pytest.fixture(scope="module")
def run(trained):
    return trained.folder


def test_a_run_that_lost_its_last_step_ends_the_same(trained, tmp_path, monkeypatch):
    """A run killed after step 1 of 2 and resumed ends with the whole run's folder and state."""
    resumed = tmp_path / "run"
    shutil.copytree(trained.folder, resumed)
    shutil.rmtree(resumed / "checkpoints" / "2")
    (resumed / "result.json").unlink()
    keep_programs(monkeypatch, trained.programs)
    assert train.main([*trained.arguments, "--out", str(resumed)]) == 0
    *_, whole = restore_run(trained.folder)
    *_, end = restore_run(resumed)
    assert int(end.step) == 2
    chex.assert_trees_all_equal(end, whole)
    for name in ("metrics.jsonl", "result.json"):
        assert (resumed / name).read_text() == (trained.folder / name).read_text()


def test_a_run_is_trained_and_scored(run):
    result = json.loads((run / "result.json").read_text())
    assert {"eval_box_AP", "eval_mask_AP"} <= set(result)
    facts = json.loads((run / "data.json").read_text())
    assert facts.pop("class_names") == ["background", "square", "triangle", "L"]
    assert facts == {"train_size": 4, "category_ids": [0, *CATEGORY_IDS]}


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
        label = ("square", "triangle", "L").index(each["category"])
        assert each["category_id"] == CATEGORY_IDS[label]
    assert predict.main([str(run), str(image), "--top", "2"]) == 0


def test_results_are_written_in_coco_format(run, tmp_path):
    file = tmp_path / "results.json"
    assert evaluate.main([str(run), "--results", str(file), "--batch-size", "1"]) == 0
    for each in json.loads(file.read_text()):
        assert set(each) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        assert each["category_id"] in CATEGORY_IDS


def test_a_serialized_detector_takes_one_image(run, tmp_path):
    file = tmp_path / "detector.jax.gz"
    assert convert.main(["run", str(run), str(file), "--format", "jax"]) == 0
    program = jax.export.deserialize(bytearray(gzip.decompress(file.read_bytes())))
    assert sorted(x.shape for x in program.in_avals) == [(1, 2), (1, 64, 64, 3)]
    assert (1, 48, 28, 28) in [x.shape for x in program.out_avals]


def test_a_missing_dataset_says_how_to_get_it(tmp_path, capsys):
    arguments = ["scenes_mask_rcnn_tiny_gn_ws", "--data.data-dir", str(tmp_path)]
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "python -m experiments.scenes" in error
    assert len(error.splitlines()) == 1
