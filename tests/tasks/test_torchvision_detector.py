"""Our Mask R-CNN with GN+WS equals one built from torchvision's parts.

GN+WS is in ResNet-50, the pyramid and the heads.
The same parameters give the same features, proposals, detections, losses and gradients. `-s` prints
the differences.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from wsbcn_flax import WSConv
from wsbcn_flax.models import ResNet50
from wsbcn_flax.models.detection import MaskRCNN
from wsbcn_flax.tasks import Detection
from wsbcn_flax.transforms import import_checkpoint

torch = pytest.importorskip("torch", reason="comparing needs the extra torch")
pytestmark = [
    # torchvision keeps the boxes of a batch of one image as a list of one array.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]

TOLERANCE = 1e-6  # Relative to the largest value of each array, in float64.
# The sides are multiples of 64; otherwise torchvision spreads the anchors of P6 over the image.
HEIGHT, WIDTH, CLASSES, PROPOSALS = 128, 192, 3, 60
SIZES = (16, 32, 48, 64, 96)
REGIONS = 4 * (PROPOSALS + 2)  # Enough to take all proposals and both objects.
ANCHORS = 2 * 3 * sum(HEIGHT * WIDTH // stride**2 for stride in (4, 8, 16, 32, 64))


@pytest.fixture(scope="module")
def theirs():
    from torchvision.models import resnet50
    from torchvision.models.detection import MaskRCNN as TorchMaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    from experiments.bench._torch import WeightStandardization

    torch.manual_seed(0)
    norm = functools.partial(torch.nn.GroupNorm, 32)
    channels = [256, 512, 1024, 2048]
    stages = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(
        resnet50(norm_layer=norm), stages, channels, 256, LastLevelMaxPool(), norm
    )
    model = TorchMaskRCNN(
        backbone,
        CLASSES + 1,
        min_size=HEIGHT,
        max_size=WIDTH,
        image_mean=[0] * 3,
        image_std=[1] * 3,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in SIZES), ((0.5, 1.0, 2.0),) * len(SIZES)
        ),
        rpn_batch_size_per_image=ANCHORS,
        **{
            f"rpn_{when}_nms_top_n_{mode}": PROPOSALS
            for when, mode in (
                ("pre", "train"),
                ("pre", "test"),
                ("post", "train"),
                ("post", "test"),
            )
        },
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm),
        box_batch_size_per_image=REGIONS,
        mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm),
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.GroupNorm):  # Values other than the initial ones.
            torch.nn.init.normal_(module.weight, 1, 0.1)
            torch.nn.init.normal_(module.bias, 0, 0.1)
        normalized = "rpn" not in name and "predictor" not in name
        if type(module) is torch.nn.Conv2d and normalized:
            torch.nn.utils.parametrize.register_parametrization(
                module, "weight", WeightStandardization()
            )
    # Otherwise all scores are nearly equal, and rounding decides their order.
    torch.nn.init.normal_(model.rpn.head.cls_logits.weight, 0, 0.2)
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, 0, 0.2)
    torch.nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, 0, 0.02)
    return model.double()  # In float32, rounding sometimes changes the order of proposals.


@pytest.fixture(scope="module", autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def task():
    norm = functools.partial(nn.GroupNorm, num_groups=32, epsilon=1e-5)
    backbone = ResNet50(num_classes=None, conv=WSConv, norm=norm)
    return Detection(
        model=MaskRCNN(backbone, num_classes=CLASSES, conv=WSConv, norm=norm),
        anchor_sizes=SIZES,
        anchors=ANCHORS,
        regions=REGIONS,
        proposals=(PROPOSALS, PROPOSALS),
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    boxes = np.array([[10.3, 20.7, 71.2, 90.1], [60.6, 31.3, 139.5, 119.2]])
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    bitmaps = [
        ((columns - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((rows - (y1 + y2) / 2) / (y2 - y1)) ** 2
        < 0.25
        for x1, y1, x2, y2 in boxes
    ]
    return {
        "image": rng.normal(size=(1, HEIGHT, WIDTH, 3)),
        "image_hw": np.array([[HEIGHT, WIDTH]]),
        "id": np.zeros(1, np.int32),
        "boxes": boxes[None],
        "labels": np.array([[1, 3]]),
        "valid": np.ones((1, 2), bool),
        "bitmaps": np.array(bitmaps)[None].astype(np.uint8),
    }


def torch_images(batch):
    return torch.from_numpy(batch["image"].transpose(0, 3, 1, 2).copy())


def imported(arrays):
    """Converts parameters, or their gradients, of torchvision's model to ours."""
    arrays = {
        name.replace("parametrizations.weight.original", "weight"): array.detach().numpy()
        for name, array in arrays
    }
    body = "backbone.body."
    stages = {k.removeprefix(body): v for k, v in arrays.items() if k.startswith(body)}
    stages |= {"fc.weight": np.zeros((1000, 2048)), "fc.bias": np.zeros(1000)}
    backbone = dict(import_checkpoint(stages, "R-50-GN-WS")["params"])
    del backbone["head"]

    def layer(name):
        """Converts a convolution, dense layer or normalization."""
        kernel = arrays[f"{name}.weight"]
        bias = {"bias": arrays[f"{name}.bias"]} if f"{name}.bias" in arrays else {}
        if kernel.ndim == 1:
            return {"scale": kernel, **bias}
        return {"kernel": kernel.transpose(*range(2, kernel.ndim), 1, 0), **bias}

    def blocks(name, *, count, conv, norm, first=0):
        names = ((i, f"{name}.{i - first}") for i in range(first, first + count))
        return {
            key: value
            for i, block in names
            for key, value in {
                conv.format(i): layer(f"{block}.0"),
                norm.format(i): layer(f"{block}.1"),
            }.items()
        }

    rpn, roi = "rpn.head", "roi_heads"
    fc6 = layer(f"{roi}.box_head.5")
    # torchvision flattens rows, columns and channels in another order.
    fc6["kernel"] = fc6["kernel"].reshape(256, 49, -1).transpose(1, 0, 2).reshape(256 * 49, -1)
    deconv = layer(f"{roi}.mask_predictor.conv5_mask")
    deconv["kernel"] = deconv["kernel"].swapaxes(2, 3)
    heads = {"count": 4, "first": 1, "conv": "conv{}", "norm": "norm{}"}
    pyramid = {"count": 4, "first": 2}
    return {
        "backbone": backbone,
        "fpn": {
            **blocks(
                "backbone.fpn.inner_blocks", conv="inner{}_conv", norm="inner{}_norm", **pyramid
            ),
            **blocks(
                "backbone.fpn.layer_blocks", conv="layer{}_conv", norm="layer{}_norm", **pyramid
            ),
        },
        "rpn": {
            "conv": layer(f"{rpn}.conv.0.0"),
            "logits": layer(f"{rpn}.cls_logits"),
            "deltas": layer(f"{rpn}.bbox_pred"),
        },
        "box_head": {
            **blocks(f"{roi}.box_head", **heads),
            "fc6": fc6,
            "logits": layer(f"{roi}.box_predictor.cls_score"),
            "deltas": layer(f"{roi}.box_predictor.bbox_pred"),
        },
        "mask_head": {
            **blocks(f"{roi}.mask_head", **heads),
            "deconv": deconv,
            "logits": layer(f"{roi}.mask_predictor.mask_fcn_logits"),
        },
    }


@pytest.fixture(scope="module")
def params(theirs):
    arrays = imported(theirs.named_parameters())
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)


def assert_close(name, received, expected):
    """Asserts that the error is small relative to the largest expected value."""
    received, expected = np.asarray(received), np.asarray(expected)
    assert received.shape == expected.shape, name
    difference = np.abs(received - expected).max() / np.abs(expected).max()
    print(f"{name:40} {difference:.1e}")
    assert difference < TOLERANCE, name


def test_parameters_are_those_of_our_model(task, params, batch):
    own = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
    shapes = functools.partial(jax.tree.map, lambda x: x.shape)
    assert shapes(params) == shapes(own)


@pytest.fixture(scope="module")
def their_stages(theirs, batch):
    """Their pyramid, proposals and detections, before masks are pasted into the image."""
    theirs.eval()
    with torch.no_grad():
        images, _ = theirs.transform([torch_images(batch)[0]])
        features = theirs.backbone(images.tensors)
        proposals, _ = theirs.rpn(images, features)
        (found,), _ = theirs.roi_heads(features, proposals, images.image_sizes)
    return list(features.values()), proposals[0].numpy(), {k: v.numpy() for k, v in found.items()}


def test_features_and_proposals(task, params, batch, their_stages):
    features, proposals, _ = their_stages

    @jax.jit
    def first_stage(params):
        def of_model(model):
            levels, anchors, outputs = task._first_stage(model, batch, train=False)
            return levels, task._propose(outputs, anchors, batch["image_hw"], train=False)

        return nn.apply(of_model, task.model)({"params": params})

    levels, found = first_stage(params)
    for i, (level, expected) in enumerate(zip(levels, features, strict=True), start=2):
        assert_close(f"P{i}", level, expected.numpy().transpose(0, 2, 3, 1))
    assert_close("proposals", found.boxes[0][found.valid[0]], proposals)


def test_detections(task, params, batch, their_stages):
    *_, expected = their_stages
    found = jax.jit(lambda params: task.evaluate(params, {}, batch))(params)
    found = {name: np.asarray(found[name][0])[found["valid"][0]] for name in (*expected, "valid")}
    assert len(expected["boxes"]) > 20
    np.testing.assert_array_equal(found["labels"], expected["labels"])
    assert_close("boxes", found["boxes"], expected["boxes"])
    assert_close("scores", found["scores"], expected["scores"])
    assert_close("masks", found["masks"], expected["masks"][:, 0])


def test_losses_and_gradients(theirs, task, params, batch):
    theirs.train()
    target = {
        "boxes": torch.from_numpy(batch["boxes"][0]),
        "labels": torch.from_numpy(batch["labels"][0]),
        "masks": torch.from_numpy(batch["bitmaps"][0]),
    }
    expected = theirs([torch_images(batch)[0]], [target])
    sum(expected.values()).backward()

    def loss(params):
        return task.loss(params, {}, batch, rng=jax.random.key(0), extra=jnp.zeros((), jnp.int32))

    (_, (_, losses)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    names = {
        "objectness_loss": "loss_objectness",
        "proposal_loss": "loss_rpn_box_reg",
        "class_loss": "loss_classifier",
        "box_loss": "loss_box_reg",
        "mask_loss": "loss_mask",
    }
    assert losses.keys() == names.keys()
    for ours, name in names.items():
        assert_close(ours, losses[ours], expected[name].item())
    their_gradients = imported((name, p.grad) for name, p in theirs.named_parameters())
    ours = traverse_util.flatten_dict(gradients, sep="/")
    for name, gradient in traverse_util.flatten_dict(their_gradients, sep="/").items():
        assert_close(f"gradient of {name}", ours[name], gradient)
