"""Scenes of Fashion-MNIST: exact masks, COCO's format, reproducible from the seed."""

import json
import sys

import numpy as np
import pytest

from experiments import scenes
from wsbcn_flax.data import ImageSource, decode_rle, load_coco

CLASS_NAMES = ("disc", "square")


def make_items(seed):
    """Makes twenty light discs and squares on black, like the items of Fashion-MNIST."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:28, :28] - 13.5
    radius = rng.uniform(8, 13, 20)[:, np.newaxis, np.newaxis]
    labels = np.arange(20, dtype=np.int32) % 2
    is_square = labels[:, np.newaxis, np.newaxis] == 1
    inside = np.where(is_square, np.maximum(abs(x), abs(y)), np.hypot(x, y)) < radius
    images = np.where(inside, rng.integers(100, 256, (20, 28, 28)), 0).astype(np.uint8)
    return ImageSource(
        images=images[..., np.newaxis],
        labels=labels,
        num_classes=2,
        name="shapes",
        class_names=CLASS_NAMES,
    )


def textures(seed):
    rng = np.random.default_rng(seed)
    sizes = ((90, 150), (120, 70))
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def draw(count, *, seed=0, size=64):
    return list(
        scenes.draw_scenes(make_items(0), textures(1), count=count, size=size, seed=(seed, 0))
    )


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command on shapes and textures; returns its exit status."""
    monkeypatch.setattr(
        scenes, "load_split", lambda name, split, **_: make_items(("train", "test").index(split))
    )
    monkeypatch.setattr(
        scenes, "load_photographs", lambda split: textures(("train", "val").index(split))
    )

    def call(*arguments, out=tmp_path / "scenes"):
        sizes = ["--train", "5", "--val", "3", "--size", "64"]
        return scenes.main(["--out", str(out), *sizes, *arguments])

    return call


def test_scenes_depend_on_the_seed_and_their_number_alone():
    first, again, other = draw(6), draw(9), draw(6, seed=1)
    for one, two in zip(first, again[:6], strict=True):
        np.testing.assert_array_equal(one.image, two.image)
        np.testing.assert_array_equal(one.masks, two.masks)
        assert one.labels == two.labels
    assert all((one.image != two.image).any() for one, two in zip(first, other, strict=True))


def test_masks_are_the_visible_pixels_of_each_item(monkeypatch):
    """Every item is painted in its own color on black."""

    def cut_out(item, side, rng):
        color = rng.integers(60, 256, 3).astype(np.float32) / 255
        return np.tile(color, (side, side, 1)), np.ones((side, side), np.float32)

    monkeypatch.setattr(scenes, "_cut_out", cut_out)
    counts = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scene = scenes.draw_scene(make_items(0), np.zeros((64, 64, 3), np.float32), rng)
        assert len(scene.masks) == len(scene.labels) <= 5
        assert (scene.masks.sum(axis=0) <= 1).all(), "no pixel belongs to two"
        for mask in scene.masks:
            colors = np.unique(scene.image[mask], axis=0)
            assert (len(colors), mask.sum() > 20) == (1, True)
            assert colors.any()
        assert not scene.image[~scene.masks.any(axis=0)].any()
        counts.append(len(scene.masks))
    assert set(counts) >= {1, 2, 3}


def test_an_item_covers_its_outline_and_holes_in_it():
    item = make_items(0).images[0, ..., 0].copy()
    item[12:16, 12:16] = 0  # dark cloth
    pixels, alpha = scenes._cut_out(item, 56, np.random.default_rng(0))
    assert (pixels.shape, pixels.dtype, alpha.shape) == ((56, 56, 3), np.float32, (56, 56))
    assert alpha[24:32, 24:32].min() == 1
    assert pixels[24:32, 24:32].min() > 0
    assert (alpha > 0.5).sum() == pytest.approx(4 * (make_items(0).images[0] > 0).sum(), rel=0.05)


def test_the_command_writes_coco_format(run, tmp_path, capsys):
    assert run("--figure", str(tmp_path / "figures" / "few.png")) == 0
    assert "train: 5 images with" in capsys.readouterr().out
    folder = tmp_path / "scenes"
    for split, count in (("train", 5), ("val", 3)):
        file = folder / f"instances_{split}.json"
        source = load_coco(file, folder / split)
        assert (len(source), source.skipped) == (count, {})
        assert source.class_names == ("background", *CLASS_NAMES)
        for annotation in json.loads(file.read_text())["annotations"]:
            mask = decode_rle(annotation["segmentation"])
            assert mask.sum() == annotation["area"]
            x, y, width, height = annotation["bbox"]
            inside = mask[y : y + height, x : x + width]
            assert inside.sum() == mask.sum(), "nothing outside the box"
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.any(), "the box is tight"
    assert (tmp_path / "figures" / "few.png").stat().st_size > 20_000


def test_the_same_seed_writes_the_same_files(run, tmp_path):
    contents = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run("--seed", seed, out=tmp_path / name) == 0
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        assert len(files) == 5 + 3 + 2
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


@pytest.mark.parametrize(
    ("options", "received"),
    [({"train": 0}, "received 0, 500 and 128"), ({"size": 8}, "and 8"), ({"seed": -1}, "-1")],
)
def test_rejects(options, received):
    with pytest.raises(ValueError, match=received):
        scenes.ScenesOptions(**options)


def test_photographs_are_there_and_no_split_shares_them():
    pytest.importorskip("skimage")
    assert not set(scenes.PHOTOGRAPHS["train"]) & set(scenes.PHOTOGRAPHS["val"])
    for split, names in scenes.PHOTOGRAPHS.items():
        photographs = scenes.load_photographs(split)
        assert len(photographs) == len(names)
        for photograph in photographs:
            assert photograph.dtype == np.uint8
            assert photograph.shape[2] == 3
            assert min(photograph.shape[:2]) >= 300


def test_photographs_need_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.data", None)
    with pytest.raises(ImportError, match=r"run: pip install 'wsbcn_flax\[scenes\]'"):
        scenes.load_photographs("train")
