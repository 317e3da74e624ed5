"""The pipelines' benchmark draws whole passes from sets of the right size."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments import bench
from experiments._bench.data import Pipeline, data_rows
from experiments._bench.jpegs import write_jpeg_folders


def test_files_are_photographs_in_imagenets_layout(tmp_path):
    seen = []
    mean = write_jpeg_folders(tmp_path, 3, on_file=lambda: seen.append(1))
    assert len(seen) == 3
    for split in ("train", "val"):
        files = sorted((tmp_path / "imagenet" / split).glob("n*/*.JPEG"))
        assert len(files) == 3
        assert np.mean([file.stat().st_size for file in files]) == pytest.approx(mean)
        for file in files:
            with Image.open(file) as image:
                assert 450 <= image.width <= 550
                assert 337 <= image.height <= 413


def test_images_per_second_are_of_the_median_pass():
    pipelines = {"train": Pipeline(make=lambda: None, batches=1, images=10)}
    (row,) = data_rows(pipelines, {("train", 2): np.array([2.0, 2.0, 100.0])})
    assert row["images_per_second"] == 5
    assert row["threads"] == 2


def test_data_writes_its_rows(tmp_path, capsys):
    pytest.importorskip("cv2", reason="decoding JPEG files needs the extra jpeg")
    path = tmp_path / "data.json"
    options = {"in-memory": "digits", "jpegs": 8, "batch": 6, "repeats": 1, "image-size": 32}
    arguments = [str(item) for name, value in options.items() for item in (f"--{name}", value)]
    folders = ["--data-dir", str(tmp_path), "--json", str(path)]
    assert bench.main(["data", *arguments, *folders, "--threads", "0", "1"]) == 0
    rows = json.loads(path.read_text())
    assert [(row["pipeline"], row["threads"], row["images"]) for row in rows] == [
        (name, threads, images)
        for name, images in (("digits_train", 1794), ("jpeg_train", 6), ("jpeg_eval", 8))
        for threads in (0, 1)
    ]
    keys = {"pipeline", "threads", "images", "images_per_second", "median_ms", "spread"}
    assert all(set(row) == keys for row in rows)
    assert "kB on average" in capsys.readouterr().out
