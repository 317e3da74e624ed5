"""COCO 2017, as the authors of Weight Standardization train detectors on it.

    python -m experiments.train coco_mask_rcnn_r50_gn_ws --data.no-caffe --model.weights R50.pth.tar

Their code is a fork of maskrcnn-benchmark. SGD has momentum 0.9 and a learning rate of 0.00125 for
each image of the batch. The rate starts with 500 steps of linear warm-up from a third, and is
divided by 10 at two milestones. Biases learn twice as fast and do not decay. Stem and first stage
are frozen. Images have a shorter side of 800 pixels. GN and BCN have 32 groups. Backbones start
from weights trained on ImageNet, which `model.weights` names.
"""

from experiments._detection import COCO_FACTS, DetectionRecipe, DetectorConfig
from experiments._detection_data import CocoConfig
from experiments._recipe import NormConfig, WeightConfig
from experiments.recipes._table import Published
from wsbcn_flax.training import BatchConfig, OptimizerConfig


def _recipe(model: str, *, batch: int, steps: int, milestones: tuple[int, int]) -> DetectionRecipe:
    """Returns the recipe of a detector, with its length and milestones in steps."""
    per_epoch = COCO_FACTS["coco"]["train_size"] // batch
    return DetectionRecipe(
        data=CocoConfig(name="coco", train_split="train2017", eval_split="val2017", caffe=True),
        model=DetectorConfig(name=model),
        norm=NormConfig(groups=32),
        weight=WeightConfig(preset="official"),
        batch=BatchConfig(size=batch, loop="auto"),
        optim=OptimizerConfig(
            learning_rate=0.00125 * batch,
            schedule="step",
            milestones=tuple(step / per_epoch for step in milestones),
            warmup_epochs=500 / per_epoch,
            warmup_start=1 / 3,
            decays_everything=True,
            decays_biases=False,
            bias_factor=2.0,
            frozen=("backbone/stem_*", "backbone/stage1_*"),
        ),
        epochs=steps / per_epoch,
    )


RECIPES = [
    _recipe("faster_rcnn_r50", batch=8, steps=180_000, milestones=(120_000, 160_000)),
    _recipe("faster_rcnn_x50", batch=8, steps=180_000, milestones=(120_000, 160_000)),
    _recipe("faster_rcnn_r101", batch=4, steps=360_000, milestones=(240_000, 320_000)),
    _recipe("faster_rcnn_x101", batch=4, steps=360_000, milestones=(240_000, 320_000)),
    _recipe("mask_rcnn_r50", batch=8, steps=360_000, milestones=(300_000, 340_000)),
    _recipe("mask_rcnn_x50", batch=8, steps=360_000, milestones=(300_000, 340_000)),
    _recipe("mask_rcnn_r101", batch=4, steps=720_000, milestones=(600_000, 680_000)),
    _recipe("mask_rcnn_x101", batch=4, steps=720_000, milestones=(600_000, 680_000)),
]

SOURCE = "the authors' maskrcnn-benchmark README, COCO val2017"
# Box AP, and mask AP.
PUBLISHED = {
    "coco_faster_rcnn_r50_gn_ws": Published("39.36 box AP", SOURCE, None),
    "coco_faster_rcnn_r101_gn_ws": Published("41.32 box AP", SOURCE, None),
    "coco_faster_rcnn_x50_gn_ws": Published("40.25 box AP", SOURCE, None),
    "coco_faster_rcnn_x101_gn_ws": Published("41.90 box AP", SOURCE, None),
    "coco_mask_rcnn_r50_gn_ws": Published("40.81 box AP, 36.51 mask AP", SOURCE, None),
    "coco_mask_rcnn_r101_gn_ws": Published("42.73 box AP, 37.92 mask AP", SOURCE, None),
    "coco_mask_rcnn_x50_gn_ws": Published("42.00 box AP, 37.28 mask AP", SOURCE, None),
    "coco_mask_rcnn_x101_gn_ws": Published("43.12 box AP, 38.34 mask AP", SOURCE, None),
}
