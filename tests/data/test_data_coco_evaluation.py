"""COCO's metrics of the ground truth and of worse detections equal those of pycocotools."""

import contextlib
import copy
import functools
import io
import json
import warnings

import numpy as np
import pytest
from coco_files import coco_content, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from wsbcn_flax.data import (
    CocoEvaluator,
    DecodeAnnotatedImage,
    PadBoxes,
    PadImage,
    RasterizeMasks,
    ResizeShorter,
    eval_batches,
    load_coco,
)
from wsbcn_flax.tasks import Mean
from wsbcn_flax.training import Average, evaluate

TRANSFORMS = (
    RasterizeMasks(),
    DecodeAnnotatedImage(),
    ResizeShorter(shorter=100, longer=150),
    PadImage(buckets=((150, 150),)),
    PadBoxes(slots=5),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """An annotation file of seven images, one covered by a crowd and one without objects."""
    content = coco_content(7)
    crowd = {**copy.deepcopy(content["annotations"][0]), "id": 7, "iscrowd": 1}
    height, width = (content["images"][0][key] for key in ("height", "width"))
    rle = {"counts": [0, height * width], "size": [height, width]}
    crowd |= {"segmentation": rle, "bbox": [0, 0, width, height], "area": height * width}
    content["annotations"].append(crowd)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 12]
    return write_coco(tmp_path_factory.mktemp("coco"), content)


@pytest.fixture(scope="module")
def truth(file):
    """Detections equal to the ground truth, in batches of 4; the last batch is padded."""
    source = load_coco(file, file.parent / "images", keep_empty=True)
    batches = list(eval_batches(source, batch_size=4, example=TRANSFORMS))
    assert [batch["mask"].sum() for batch in batches] == [4, 3]
    for batch in batches:
        batch["scores"] = batch["valid"] * np.float32(0.9)
        batch["masks"] = batch["masks"].astype(np.float32)
    return batches


def worse(batches, seed=0):
    """Returns detections of which some are missing, moved, of another class, or invented."""
    rng = np.random.default_rng(seed)
    batches = copy.deepcopy(batches)
    for batch in batches:
        shape = batch["valid"].shape
        batch["boxes"] += rng.normal(0, 3, (*shape, 4)).astype(np.float32)
        batch["boxes"][..., 2:] = np.maximum(batch["boxes"][..., 2:], batch["boxes"][..., :2] + 9)
        batch["valid"] ^= rng.random(shape) < 0.2
        batch["labels"] = np.where(rng.random(shape) < 0.2, 1, np.maximum(batch["labels"], 1))
        batch["scores"] = rng.random(shape).astype(np.float32)
    return batches


def score(file, batches, **options):
    evaluator = CocoEvaluator(file, **options)
    for batch in batches:
        evaluator.add(batch)
    return evaluator.result()


def test_the_truth_is_found_perfectly(file, truth):
    """All objects are small by COCO's definition."""
    names = {"AP", "AP50", "AP75", "AP_small", "AR"}
    metrics = score(file, truth)
    assert metrics == dict.fromkeys({f"{k}_{n}" for k in ("box", "mask") for n in names}, 1.0)


def test_detections_in_a_crowd_are_not_wrong_and_elsewhere_they_are(file, truth):
    for image, expected in ((0, True), (1, False)):
        extra = copy.deepcopy(truth)
        extra[0]["valid"][image, 4] = True
        extra[0]["boxes"][image, 4] = (5, 60, 35, 90)
        extra[0]["masks"][image, 4] = 1
        extra[0]["labels"][image, 4] = extra[0]["labels"][0, 0]
        extra[0]["scores"][image, 4] = 0.99
        metrics = score(file, extra)
        assert (metrics["box_AP"] == 1) == (metrics["mask_AP"] == 1) == expected


@pytest.mark.filterwarnings("ignore:__array__")
def test_metrics_are_those_of_pycocotools_on_the_results_file(file, truth, tmp_path):
    metrics = score(file, worse(truth), results=tmp_path / "results.json")
    assert 0.05 < metrics["box_AP"] < 0.9
    assert 0.05 < metrics["mask_AP"] < 0.9
    for kind, name, without in (("bbox", "box", "segmentation"), ("segm", "mask", "bbox")):
        results = json.loads((tmp_path / "results.json").read_text())
        for each in results:
            assert each.keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}
            del each[without]
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(file)
            evaluation = COCOeval(coco, coco.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        for index, key in enumerate(("AP", "AP50", "AP75", "AP_small")):
            assert metrics[f"{name}_{key}"] == pytest.approx(evaluation.stats[index], abs=1e-12)


def test_results_are_in_the_original_image(file, truth, tmp_path):
    score(file, truth, results=tmp_path / "results.json")
    results = json.loads((tmp_path / "results.json").read_text())
    expected = [a for a in json.loads(file.read_text())["annotations"] if not a["iscrowd"]]
    for found, annotation in zip(results, expected, strict=True):
        for key in ("image_id", "category_id"):
            assert found[key] == annotation[key]
        np.testing.assert_allclose(found["bbox"], annotation["bbox"], rtol=1e-5, atol=1e-4)


def test_the_last_pixel_of_a_box_belongs_to_it(file, truth):
    last = copy.deepcopy(truth)
    for batch in last:  # Boxes are one pixel of the original image smaller.
        sizes = np.array([(60, 40) if h < w else (40, 60) for h, w in batch["image_hw"]])
        ratios = batch["image_hw"][:, ::-1] / np.where(batch["mask"][:, None], sizes, 1)
        batch["boxes"][..., 2:] -= ratios[:, np.newaxis].astype(np.float32)
    assert score(file, last)["box_AP"] < 0.9
    assert score(file, last, pixel=1)["box_AP"] == 1


def test_boxes_alone(file, truth):
    boxes = [{k: v for k, v in batch.items() if k != "masks"} for batch in worse(truth)]
    expected = score(file, worse(truth))
    metrics = score(file, boxes)
    assert metrics == {k: v for k, v in expected.items() if k.startswith("box_")}


def test_only_images_that_were_given_count(file, truth):
    assert score(file, truth[:1])["box_AP"] == 1
    missed = copy.deepcopy(truth)
    missed[1]["valid"][:] = False
    assert score(file, missed)["box_AP"] < 1


def test_nothing_found(file, truth):
    nothing = [batch | {"valid": np.zeros_like(batch["valid"])} for batch in truth]
    metrics = score(file, nothing)
    assert metrics["box_AP"] == metrics["mask_AP"] == 0


def test_images_that_come_twice_count_once(file, truth):
    assert score(file, [*worse(truth), *truth]) == score(file, worse(truth))


def test_the_other_backend_gives_the_same_numbers(file, truth):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("faster_coco_eval")
    expected = score(file, worse(truth))
    found = score(file, worse(truth), backend="faster_coco_eval")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-9), key


def test_it_is_an_evaluator_beside_others(file, truth):
    def step(state, batch):
        return batch | {"loss": Mean(batch["valid"].sum(), batch["mask"].sum())}

    made = (Average, functools.partial(CocoEvaluator, file))
    metrics = evaluate(step, None, worse(truth), evaluators=made)
    assert metrics.pop("loss") > 0
    assert metrics == score(file, worse(truth))


def test_a_truth_without_masks(file, truth, tmp_path):
    content = json.loads(file.read_text())
    del content["annotations"][2]["segmentation"]
    other = tmp_path / "boxes.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"boxes\.json: .* 1 without one, such as 102; leave"):
        score(other, truth)
    boxes = [{k: v for k, v in batch.items() if k != "masks"} for batch in truth]
    assert score(other, boxes)["box_AP"] == 1


def test_rejects(file, truth):
    with pytest.raises(ValueError, match="at least one image, received none"):
        CocoEvaluator(file).result()
    with pytest.raises(ValueError, match=r"instances\.json, received id 99; are the batches of an"):
        score(file, [truth[0] | {"id": np.array([99, 10, 11, 12])}])
    with pytest.raises(ValueError, match=r"from 1 to the 3 categories of .*json, received 4"):
        score(file, [truth[0] | {"labels": truth[0]["labels"] + 3}])
