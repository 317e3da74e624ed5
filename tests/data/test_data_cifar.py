"""CIFAR from archives in the format of the published ones: pixels, names, and damage."""

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pytest
import python2_pickle
from cifar_archives import cifar_members, write_archive, write_cifar

from wsbcn_flax.data import CifarFormatError
from wsbcn_flax.data._cifar import CIFAR10, CIFAR100, read_cifar_archive

BATCH_3 = "cifar-10-batches-py/data_batch_3"
META = "cifar-10-batches-py/batches.meta"
LAYOUTS = pytest.mark.parametrize("layout", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])


@LAYOUTS
def test_reads_every_image_of_every_member_in_order(tmp_path, layout):
    written = write_cifar(tmp_path, layout)
    archive = read_cifar_archive(tmp_path / layout.archive, layout)
    assert archive.splits.keys() == written.keys() == {"train", "test"}
    for split, (images, labels) in written.items():
        assert archive.splits[split][0].dtype == np.uint8
        np.testing.assert_array_equal(archive.splits[split][0], images)
        np.testing.assert_array_equal(archive.splits[split][1], labels)
    assert archive.class_names == tuple(f"class_{n}" for n in range(layout.num_classes))


def test_the_first_thousand_numbers_are_the_red_channel(tmp_path):
    def paint(members):
        members["cifar-10-batches-py/test_batch"][b"data"][:, :1024] = 255
        members["cifar-10-batches-py/test_batch"][b"data"][:, 1024:] = 0

    write_cifar(tmp_path, CIFAR10, change=paint)
    images, _ = read_cifar_archive(tmp_path / CIFAR10.archive, CIFAR10).splits["test"]
    assert (images == [255, 0, 0]).all()


def test_extracts_nothing(tmp_path):
    write_cifar(tmp_path, CIFAR10)
    read_cifar_archive(tmp_path / CIFAR10.archive, CIFAR10)
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR10.archive]


def test_missing_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz"):
        read_cifar_archive(tmp_path / CIFAR10.archive, CIFAR10)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_cut_short(tmp_path, share):
    path = tmp_path / CIFAR10.archive
    write_cifar(tmp_path, CIFAR10)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CifarFormatError, match=r"(not a whole gzip|not a tar).*fetch it again"):
        read_cifar_archive(path, CIFAR10)


def test_flipped_bits(tmp_path):
    """Anywhere past the header, whose time and flags mean nothing here."""
    path = tmp_path / CIFAR10.archive
    write_cifar(tmp_path, CIFAR10)
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(100, len(content), 20):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CifarFormatError, match=r"not a whole gzip file .*fetch it again"):
            read_cifar_archive(path, CIFAR10)


def test_no_tar_archive(tmp_path):
    path = tmp_path / CIFAR10.archive
    path.write_bytes(gzip.compress(b"<html>moved</html>"))
    with pytest.raises(CifarFormatError, match="not a tar archive"):
        read_cifar_archive(path, CIFAR10)


def test_the_other_archive(tmp_path):
    write_cifar(tmp_path, CIFAR100)
    with pytest.raises(CifarFormatError, match=rf"must hold .* it lacks {META}, .*test_batch$"):
        read_cifar_archive(tmp_path / CIFAR100.archive, CIFAR10)


def test_a_link_is_not_followed(tmp_path):
    """A member may only be a file: a link could lead to another one."""
    members, _ = cifar_members(CIFAR10)
    pickles = {name: python2_pickle.dumps(member) for name, member in members.items()}
    write_archive(tmp_path / "whole.tar.gz", pickles)
    path = tmp_path / CIFAR10.archive
    with (
        tarfile.open(tmp_path / "whole.tar.gz") as whole,
        tarfile.open(path, "w:gz") as linked,
    ):
        for member in whole:
            if member.name == BATCH_3:
                member.type, member.linkname, member.size = tarfile.SYMTYPE, Path(META).name, 0
            linked.addfile(member, whole.extractfile(member) if member.isfile() else None)
    with pytest.raises(CifarFormatError, match=rf"it lacks {BATCH_3}$"):
        read_cifar_archive(path, CIFAR10)


class Code:
    def __reduce__(self):
        return print, ("a pickle ran code",)


def replace(**values):
    """A change of what the third batch of training images holds."""
    encoded = {key.encode(): value for key, value in values.items()}
    return lambda members: members[BATCH_3].update(encoded)


def replace_names(names):
    return lambda members: members[META].update({b"label_names": names})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop(BATCH_3), rf"it lacks {BATCH_3}$"),
        (replace(data=Code()), rf"{BATCH_3}: .* reference to \w+\.print, which could run code"),
        (replace(data=None), r"data must be uint8 \[N, 3072\], received NoneType"),
        (replace(data=np.zeros((7, 3072))), "arrays of uint8, received f8"),
        (replace(data=np.zeros((7, 1024), np.uint8)), r"received \[7, 1024\]"),
        (replace(data=np.zeros((0, 3072), np.uint8), labels=[]), r"received \[0, 3072\]"),
        (replace(data=np.zeros((), np.uint8)), r"received \[\]"),
        (replace(labels=[0] * 6), r"for each of 7 images, received 6 from 0 to 0"),
        (replace(labels=[]), "received 0 from None"),
        (replace(labels=[0, 1, 2, 3, 4, 5, 10]), r"in \[0, 10\) .*from 0 to 10"),
        (replace(labels=[0, 1, 2, 3, 4, 5, -1]), "from -1 to 5"),
        (replace(labels=[0.5] * 7), "list of whole numbers, received list"),
        (replace(labels=None), "list of whole numbers, received NoneType"),
        (replace_names([b"cat"] * 10), f"{META}: label_names must be 10 different names.* 1$"),
        (replace_names([b"%d" % n for n in range(11)]), "10 different names, received 11"),
        (replace_names(None), "a list of names, received NoneType"),
        (replace_names([1] * 10), "a list of names, received list"),
    ],
)
def test_wrong_contents(tmp_path, capsys, change, message):
    write_cifar(tmp_path, CIFAR10, change=change)
    with pytest.raises(CifarFormatError, match=message) as caught:
        read_cifar_archive(tmp_path / CIFAR10.archive, CIFAR10)
    assert str(tmp_path / CIFAR10.archive) in str(caught.value)
    assert capsys.readouterr().out == ""
