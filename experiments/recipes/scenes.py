"""Fashion-MNIST items on photographs, which `python -m experiments.scenes` writes.

    python -m experiments.train scenes_mask_rcnn_tiny_bcn_ws --batch.micro 1

The network has 1.3 million parameters and one block in each stage. AdamW trains it from scratch,
on batches of 8 images of 128x128 pixels. The learning rate is 1e-3, with warm-up and cosine decay.
"""

from experiments._detection import DetectionRecipe, DetectorConfig
from experiments._detection_data import CocoConfig
from experiments._recipe import NormConfig, WeightConfig
from wsbcn_flax.training import BatchConfig, OptimizerConfig

RECIPES = [
    DetectionRecipe(
        data=CocoConfig(
            name="scenes", shorter=128, longer=128, buckets=((128, 128),), slots=8, threads=2
        ),
        model=DetectorConfig(
            name=name,
            features=64,
            hidden=256,
            frozen_stages=0,
            convention="torchvision",
            anchor_sizes=(16, 32, 64, 96, 128),
            anchors=64,
            regions=32,
            proposals=(200, 100),
        ),
        norm=NormConfig(groups=8),
        weight=WeightConfig(preset="official"),
        batch=BatchConfig(size=8),
        optim=OptimizerConfig(
            kind="adamw", learning_rate=1e-3, weight_decay=1e-2, warmup_epochs=0.1
        ),
        epochs=2000 / (9000 // 8),
    )
    for name in ("mask_rcnn_tiny", "faster_rcnn_tiny")
]
