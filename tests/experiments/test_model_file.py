"""A trained model is exported to one file; read back, it evaluates and predicts the same."""

import dataclasses
import gzip
import json
import zlib

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from experiments import convert, curves, evaluate, predict, train
from experiments._model_file import load_model
from wsbcn_flax import data
from wsbcn_flax.data import load_split


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run that standardizes weights and keeps running statistics."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WSBCN_FLAX_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        arguments = ["digits_resnet8_bcn_ws", "--epochs", "2", "--optim.learning-rate", "0.3"]
        arguments += ["--eval-every", "22", "--model.width", "8", "--ema", "0.9"]
        arguments += ["--out", str(folder)]
        assert train.main([*arguments, "--no-progress"]) == 0
        yield folder


@pytest.fixture(scope="module")
def model(run):
    return load_model(run)


def test_evaluation_of_the_run_is_the_one_training_ended_with(run, tmp_path, capsys, monkeypatch):
    """Evaluation uses the average of the parameters, and loads no training data."""
    load = data.load_split

    def without_training_data(name, split, **options):
        assert split == "test"
        return load(name, split, **options)

    monkeypatch.setattr("experiments._image_data.load_split", without_training_data)
    assert evaluate.main([str(run), "--json", str(tmp_path / "metrics.json")]) == 0
    printed = capsys.readouterr()
    assert "evaluate: compiling the step" in printed.err
    assert "top5_error" in printed.out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    trained = json.loads((run / "result.json").read_text())
    assert metrics["error"] == pytest.approx(trained["eval_error"], abs=1e-6)
    assert metrics["loss"] == pytest.approx(trained["eval_loss"], rel=1e-4)
    assert metrics["top5_error"] <= metrics["error"] < 0.5


@pytest.mark.parametrize("fold", [False, True])
def test_a_file_holds_the_model(run, model, fold, tmp_path):
    out = tmp_path / "model.safetensors"
    assert convert.main(["run", str(run), str(out), *(["--fold"] if fold else [])]) == 0
    loaded = load_model(out)
    images = load_split("digits", "test[:8]").images
    np.testing.assert_allclose(
        jax.jit(loaded.predict_fn())(images), jax.jit(model.predict_fn())(images), rtol=1e-5
    )
    assert (loaded.recipe.weight.kind == "none") is fold
    if not fold:
        assert loaded.recipe == model.recipe
        chex.assert_trees_all_equal_shapes_and_dtypes(loaded.variables, model.variables)
        chex.assert_trees_all_equal(loaded.variables, model.variables)
    assert loaded.facts["class_names"] == list("0123456789")


def test_training_starts_from_trained_variables(model):
    name, *others = model.variables["params"]
    trained = {"params": {name: model.variables["params"][name]}}
    state = dataclasses.replace(model.experiment, trained=trained).compile().init(3)
    own = model.experiment.compile().init(3)
    chex.assert_trees_all_equal(state.params[name], trained["params"][name])
    chex.assert_trees_all_equal(*[[x.params[other] for other in others] for x in (state, own)])
    with pytest.raises(ValueError, match="received 1 of 1 that differ, such as params/none"):
        model.experiment.init(3, {"params": {"none": np.ones(2)}})


def test_a_serialized_program_needs_nothing_of_this_package(run, model, tmp_path):
    out = tmp_path / "model.jax"
    assert convert.main(["run", str(run), str(out), "--format", "jax"]) == 0
    content = gzip.decompress(out.read_bytes())
    program = jax.export.deserialize(bytearray(content))
    images = load_split("digits", "test[:5]").images
    expected = jax.jit(model.predict_fn())(images)
    for size in (1, 5):
        np.testing.assert_allclose(program.call(images[:size]), expected[:size], rtol=2e-4)
    assert {"cpu", "cuda", "tpu"} <= set(program.platforms)
    damaged = bytearray(out.read_bytes())
    for place in np.random.default_rng(0).integers(10, len(damaged), 20):  # After gzip's header.
        damaged[place] ^= 4
        with pytest.raises((OSError, EOFError, zlib.error)):
            gzip.decompress(damaged)
        damaged[place] ^= 4
    assert gzip.decompress(damaged) == content


def test_predicts_the_classes_of_image_files(run, model, tmp_path, capsys, monkeypatch):
    split = load_split("digits", "test[:3]")
    paths = []
    for index, image in enumerate(split.images):
        paths.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(image[..., 0]).save(paths[-1])
    guesses = np.argmax(jax.jit(model.predict_fn())(split.images), axis=-1)
    monkeypatch.setattr("experiments._image_data.load_split", None)  # No data at all.
    assert predict.main([str(run), *paths, "--top", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
    found = [int(next(cell for cell in row if cell.isdigit())) for row in rows]
    assert found == guesses.tolist()


def test_curves_of_a_run(run, tmp_path, capsys):
    assert curves.main([str(run), "--out", str(tmp_path / "figures" / "curves.png")]) == 0
    curve = curves.read_curve(run)
    assert curve.steps == [22, 44]
    assert f"{curve.errors[-1]:.2f}" in capsys.readouterr().out
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000


def damaged(path):
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_bad_input_is_told_in_one_line(run, model, tmp_path, capsys):
    whole = tmp_path / "whole.safetensors"
    model.save(whole)
    (tmp_path / "image.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    model.save(tmp_path / "damaged.safetensors")
    cases = {
        "neither a converted file nor": lambda: evaluate.main([str(tmp_path / "absent")]),
        "is not, or is damaged": lambda: evaluate.main(
            [str(damaged(tmp_path / "damaged.safetensors"))]
        ),
        "with recipe.json": lambda: evaluate.main([str(tmp_path / "empty")]),
        "must be a whole JPEG or PNG": lambda: predict.main(
            [str(whole), str(tmp_path / "image.png")]
        ),
        "No such file": lambda: predict.main([str(whole), str(tmp_path / "absent.png")]),
        "holds no image": lambda: evaluate.main([str(whole), "--split", "test[:0]"]),
        "must hold evaluations": lambda: curves.main([str(unevaluated(tmp_path))]),
    }
    for message, command in cases.items():
        assert command() == 1
        error = capsys.readouterr().err
        assert message in error
        assert len(error.strip().splitlines()) == 1


def unevaluated(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return folder


def test_a_flipped_bit_is_found_wherever_it_is(model, tmp_path):
    path = tmp_path / "model.safetensors"
    model.save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in (*rng.integers(8, header, 20), *rng.integers(header, len(whole), 20)):
        content = bytearray(whole)
        content[place] ^= 1 << rng.integers(8)
        path.write_bytes(content)
        with pytest.raises(ValueError, match="safetensors file that"):
            load_model(path)
    path.write_bytes(whole)
    assert load_model(path).recipe == model.recipe


def test_logits_that_are_not_finite_are_an_error(model):
    with pytest.raises(ValueError, match="logits must be finite"):
        model.recipe.describe_output(np.array([0.0, np.nan]), model.data, top=1)


def test_a_deep_image_is_scaled_and_not_clipped(model, tmp_path):
    shallow, deep = tmp_path / "8.png", tmp_path / "16.png"
    image = load_split("digits", "test[:1]").images[0, ..., 0]
    Image.fromarray(image).save(shallow)
    Image.fromarray(image.astype(np.uint16) * 257).save(deep)
    read = [model.recipe.read_input(path, model.data)[..., 0] for path in (shallow, deep)]
    np.testing.assert_array_equal(read, [image, image])


def test_a_file_that_is_not_ours_is_refused(tmp_path):
    safetensors.numpy.save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"experiments\.convert"):
        load_model(tmp_path / "other.safetensors")


def test_evaluation_needs_no_room_for_a_warm_up(run):
    """One batch of evaluation may be larger than the training set."""
    assert evaluate.main([str(run), "--batch-size", "4000"]) == 0


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (evaluate, ["{run}", "--json", "{run}/data.json/x.json"], "--json must name a file"),
        (convert, ["run", "{run}", "{tmp}"], "OUT must name a file"),
        (convert, ["run", "{run}", "{tmp}/model.jax.gz"], "must not end in .gz"),
        (predict, ["{tmp}/program", "image.png"], "received a gzip file"),
        (evaluate, ["{tmp}/empty"], "must hold the facts that"),
        (curves, [], "at least one folder of a run"),
        (curves, ["{run}", "--out", "{tmp}/curves.xyz"], "--out must end in .png"),
    ],
)
def test_mistakes_are_one_line_before_any_work(command, arguments, message, run, tmp_path, capsys):
    (tmp_path / "program").write_bytes(gzip.compress(b""))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    (tmp_path / "empty" / "data.json").write_text("{}")
    assert command.main([part.format(run=run, tmp=tmp_path) for part in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_file_has_the_usual_permissions(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
