"""ImageNet as tfds prepares it and as torchvision unpacks it."""

import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from encoded_images import CLASSES, encode, smooth_image, write_image_folder

from wsbcn_flax.data import (
    CentralCrop,
    DatasetNotFoundError,
    DecodeImage,
    eval_batches,
    load_split,
)


class ImageNetLike(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares a few images in the features and the format of tfds's imagenet2012."""

    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")
    SIZES: ClassVar = {"train": 40, "validation": 11, "test": 3}

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SIZES}

    def _generate_examples(self, split):
        for index in range(self.SIZES[split]):
            name = f"{split}_{index}.JPEG"
            image = encode(smooth_image(20 + index, 30, seed=len(split) + index), "JPEG")
            label = -1 if split == "test" else index % len(CLASSES)
            yield name, {"image": image, "label": label, "file_name": name}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A data_dir with ImageNet as tfds prepares it; tests must not write to it."""
    data_dir = tmp_path_factory.mktemp("prepared_imagenet")
    ImageNetLike(data_dir=data_dir).download_and_prepare(file_format="array_record")
    return data_dir


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """A data_dir with ImageNet as torchvision unpacks it; tests must not write to it."""
    data_dir = tmp_path_factory.mktemp("unpacked_imagenet")
    write_image_folder(data_dir / "imagenet")
    return data_dir


@pytest.fixture(params=["prepared", "unpacked"])
def data_dir(request) -> Path:
    return request.getfixturevalue(request.param)


def records(split):
    return [split.records[index] for index in range(len(split))]


def contents(split):
    return [bytes(record["image"]) for record in records(split)]


def load(data_dir, split):
    return load_split("imagenet", split, data_dir=data_dir)


def test_prepared_records_are_those_written(prepared):
    split = load(prepared, "train")
    assert (split.num_classes, split.class_names, split.name) == (3, CLASSES, "imagenet")
    builder = ImageNetLike(data_dir=prepared)
    written = dict(builder._generate_examples("train"))
    assert len(split) == len(written) == 40
    for record in records(split):
        assert record["image"] == written[record["file_name"].decode()]["image"]
        assert record["label"] == written[record["file_name"].decode()]["label"]


def test_unpacked_files_are_labelled_by_their_folder(tmp_path):
    labels = write_image_folder(tmp_path / "imagenet")
    (tmp_path / "imagenet" / "train" / CLASSES[0] / "notes.txt").write_text("no image")
    found = {}
    for name, count in (("train", 24), ("validation", 9)):
        split = load(tmp_path, name)
        assert (split.num_classes, split.class_names, split.name) == (3, CLASSES, "imagenet")
        assert len(split) == count
        found |= {bytes(record["image"]): record["label"] for record in records(split)}
        for record in records(split):
            assert record["file_name"].split("/")[1] == CLASSES[record["label"]]
    assert found == labels


def test_slices_and_sums_and_val_is_validation(data_dir):
    train, validation = (contents(load(data_dir, split)) for split in ("train", "validation"))
    for split, expected in {
        "train[:25%]": train[: len(train) // 4],
        "train[3:7]": train[3:7],
        "train[-2:]": train[-2:],
        "val": validation,
        "val[1:3]": validation[1:3],
        "train[:2]+val[:2]": train[:2] + validation[:2],
    }.items():
        assert contents(load(data_dir, split)) == expected


def test_a_slice_of_a_folder_holds_all_classes_and_is_the_same_again(unpacked):
    split = load(unpacked, "train[:50%]")
    assert set(np.bincount([record["label"] for record in records(split)])) <= {2, 3, 4, 5, 6}
    assert contents(load(unpacked, "train[:50%]")) == contents(split)


def test_suffixes_and_the_other_name_of_val(tmp_path):
    for index, name in enumerate(("a.JPEG", "b.jpg", "c.JPG", "d.jpeg", "e.png", "f.gif")):
        file = tmp_path / "imagenet" / "validation" / "cat" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(smooth_image(8, 8, seed=index)))
    files = sorted(record["file_name"] for record in records(load(tmp_path, "val")))
    assert [Path(file).name for file in files] == ["a.JPEG", "b.jpg", "c.JPG", "d.jpeg", "e.png"]


def test_prepared_comes_before_unpacked(tmp_path):
    ImageNetLike(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    write_image_folder(tmp_path / "imagenet")
    assert len(load(tmp_path, "train")) == 40


def test_batches_of_both(data_dir):
    split = load(data_dir, "train")
    transforms = (DecodeImage(), CentralCrop(image_size=16, resize=20))
    batches = eval_batches(split, batch_size=16, example=transforms)
    labels = [batch["label"] for batch in batches]
    expected = [record["label"] for record in records(split)]
    np.testing.assert_array_equal(np.concatenate(labels)[: len(split)], expected)


def test_labels_of_the_test_split_are_secret(prepared):
    with pytest.raises(ValueError, match=r"test_\d\.JPEG label .* received -1; .* secret"):
        load(prepared, "test")[0]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", r"over train, validation.* received 'dev'"),
        ("train[:3%", "such as 'train' or"),
        ("train[:0]", "holds no image"),
        ("val[100:]", "incompatible"),
    ],
)
def test_rejects_splits(data_dir, split, message):
    with pytest.raises(ValueError, match=message):
        load(data_dir, split)


def test_nowhere_says_both_ways_and_both_folders_serve(tmp_path, monkeypatch):
    monkeypatch.setenv("WSBCN_FLAX_DATA_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "theirs"))
    (tmp_path / "ours" / "imagenet").mkdir(parents=True)  # An empty folder does not count.
    with pytest.raises(DatasetNotFoundError) as caught:
        load_split("imagenet", "train")
    message = str(caught.value)
    for part in (
        "tfds build imagenet2012 --file_format=array_record --manual_dir=TARS --data_dir=DIR",
        "from torchvision.datasets import ImageNet",
        "ILSVRC2012_img_train.tar",
        f"{tmp_path / 'ours'} or {tmp_path / 'theirs'}",
        str(tmp_path / "ours" / "imagenet"),
    ):
        assert part in message
    write_image_folder(tmp_path / "theirs" / "imagenet")
    assert len(load_split("imagenet", "train")) == 24


def test_a_split_that_is_not_unpacked(tmp_path):
    write_image_folder(tmp_path / "imagenet", val=0)
    assert len(load(tmp_path, "train")) == 24
    with pytest.raises(ValueError, match=r"over train, .* received 'val"):
        load(tmp_path, "val")


def test_images_beside_the_folders_of_their_classes(tmp_path):
    write_image_folder(tmp_path / "imagenet", val=0)
    flat = tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG"
    flat.parent.mkdir()
    flat.write_bytes(b"")
    with pytest.raises(ValueError, match=r"a folder of images for each; .*imagenet/val lacks 3"):
        load(tmp_path, "val")


def test_splits_of_different_classes(tmp_path):
    write_image_folder(tmp_path / "imagenet", val=2)
    with pytest.raises(
        ValueError, match=rf"same classes, .*imagenet/val lacks 1, such as {CLASSES[2]}"
    ):
        load(tmp_path, "train")


def test_a_damaged_shard(tmp_path):
    ImageNetLike(data_dir=tmp_path).download_and_prepare(file_format="array_record")
    (shard,) = tmp_path.glob("imagenet2012/5.1.0/*-train.array_record*")
    content = bytearray(shard.read_bytes())
    used = np.flatnonzero(np.frombuffer(content, np.uint8))  # the rest fills up blocks
    content[used[len(used) // 2]] ^= 4
    shard.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"imagenet2012/5\.1\.0 is damaged, delete it"):
        records(load(tmp_path, "train"))


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [b"", b'{"features', b"\xff\xfe\x00", b"[1]"])
def test_damaged_metadata(prepared, tmp_path, name, content):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.glob(f"imagenet2012/5.1.0/{name}")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"imagenet2012/5\.1\.0 must .* prepare it again"):
        load(tmp_path, "train")
