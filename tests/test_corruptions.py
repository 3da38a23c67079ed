"""Corruptions: CIFAR-C's files, right and damaged, and generated ones, each with what it is defined by."""

import builtins
import dataclasses
import io
import sys

import numpy as np
import pytest
import torch
from fastsnn import corruptions, evaluation
from fastsnn.corruptions import CORRUPTIONS, GENERATED, corrupt, generated, generate
from PIL import Image

from trained import digits, network

COUNT = 4
NEEDS_LIBRARY = {"scipy.ndimage": "gaussian_blur", "PIL.Image": "jpeg_compression"}


def pictures(channels=3, size=32, count=COUNT):
    """Smooth pictures with an edge: [count, channels, size, size] uint8."""
    across = torch.linspace(0, 1, size)
    rows = [torch.sin(3 * across[:, None] + k + place) * torch.cos(2 * across[None] * (k + 1)) for place in range(count) for k in range(channels)]
    found = torch.stack(rows).view(count, channels, size, size) * 0.3 + 0.5
    found[:, :, size // 2 :, : size // 3] = torch.tensor([0.8, 0.2, 0.1])[:channels, None, None]
    return (found * 255).round().byte()


X = pictures()


@pytest.fixture
def folder(tmp_path):
    """Two files of CIFAR-C: a pixel's value is 10*severity + place."""
    values = (10 * np.arange(1, 6)[:, None] + np.arange(COUNT)).reshape(-1)
    for name, extra in (("fog", 0), ("contrast", 100), ("own_one", 200)):
        images = np.broadcast_to((values + extra).astype(np.uint8)[:, None, None, None], (5 * COUNT, 32, 32, 3)).copy()
        images[..., 1] = 1  # channels are the last dimension
        np.save(tmp_path / f"{name}.npy", images)
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 1, 4, 1], np.uint8), 5))
    return tmp_path


def test_files_are_read_by_severity(folder):
    for severity in range(1, 6):
        x, y = corruptions.read(folder, "fog", severity)
        assert x.dtype == torch.uint8 and x.shape == (COUNT, 3, 32, 32) and x.is_contiguous()
        assert x[:, 0, 0, 0].tolist() == [10 * severity + place for place in range(COUNT)] and (x[:, 1] == 1).all()
        assert y.dtype == torch.int64 and y.tolist() == [3, 1, 4, 1]
    x[:] = 0  # what was read is not the file
    assert corruptions.read(folder, "fog", 5)[0][0, 0, 0, 0] == 50


def test_limit_and_labels_shared_by_all_severities(folder):
    np.save(folder / "labels.npy", np.array([3, 1, 4, 1]))
    x, y = corruptions.read(folder, "contrast", 5, limit=3)
    assert x[:, 0, 0, 0].tolist() == [150, 151, 152] and y.tolist() == [3, 1, 4]


def test_a_folder_is_read_in_the_order_of_cifar_c(folder):
    found = [(name, severity) for name, severity, x, _ in corruptions.from_folder(folder, severities=(1, 5))]
    assert found == [(name, severity) for name in ("fog", "contrast", "own_one") for severity in (1, 5)]
    assert len(CORRUPTIONS) == 19 and set(GENERATED) == set(CORRUPTIONS) - {"frost", "spatter"}


def damage(folder, what):
    """One way to break CIFAR-C's folder."""
    images, labels = np.load(folder / "fog.npy"), np.load(folder / "labels.npy")
    match what:
        case "cut":
            (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:5000])
        case "objects":
            np.save(folder / "fog.npy", np.array([{}], dtype=object), allow_pickle=True)
        case "float":
            np.save(folder / "fog.npy", images / 255)
        case "planes":
            np.save(folder / "fog.npy", images.transpose(0, 3, 1, 2))
        case "uneven":
            np.save(folder / "fog.npy", images[:-1])
        case "no labels":
            (folder / "labels.npy").unlink()
        case "other labels":
            np.save(folder / "labels.npy", labels[:7])
        case "float labels":
            np.save(folder / "labels.npy", labels.astype(float))
        case "negative":
            np.save(folder / "labels.npy", labels.astype(np.int64) - 2)


@pytest.mark.parametrize(
    "what, wanted",
    [
        ("cut", "a whole .npy file"),
        ("objects", "a whole .npy file"),
        ("float", r"float64 \[20, 32, 32, 3\]; wanted uint8"),
        ("planes", "wanted uint8"),
        ("uneven", r"\[19, 32, 32, 3\]"),
        ("no labels", "holds no labels.npy"),
        ("other labels", r"wanted integers \[20\] or \[4\]"),
        ("float labels", "wanted integers"),
        ("negative", "class numbers from 0"),
    ],
)
def test_damaged_folders_are_told(folder, what, wanted):
    damage(folder, what)
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        corruptions.read(folder, "fog", 1)


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"corruption": "fogg"}, "Did you mean 'fog'"),
        ({"severity": 0}, "from 1 to 5"),
        ({"severity": True}, "from 1 to 5"),
        ({"limit": 0}, "limit is 0"),
        ({"folder": "nowhere"}, "is not a folder"),
    ],
)
def test_what_a_folder_does_not_hold_is_told(folder, change, wanted):
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        corruptions.read(**{"folder": folder, "corruption": "fog", "severity": 1, **change})


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .npy file of a corruption"):
        corruptions.from_folder(tmp_path)


@pytest.mark.parametrize("name", GENERATED)
def test_each_keeps_the_form_changes_images_and_is_keyed_by_image(name):
    for severity in (1, 5):
        found = corrupt(X, name, severity, seed=7)
        assert found.dtype == torch.uint8 and found.shape == X.shape and found.is_contiguous()
        assert (found != X).flatten(1).any(1).all()
        assert torch.equal(corrupt(X[2:], name, severity, seed=7, indices=[2, 3]), found[2:])


@pytest.mark.parametrize("name", GENERATED)
def test_severity_five_is_further_from_the_image_than_one(name):
    far = [(corrupt(X, name, severity).float() - X.float()).abs().mean() for severity in (1, 5)]
    if name == "elastic_transform":  # CIFAR-C's own severities trade the shift of the whole image for waves
        assert min(far) > 1
    else:
        assert far[1] > 1.05 * far[0]


@pytest.mark.parametrize("name", [name for name in GENERATED if name != "saturate"])
def test_grey_images_of_other_sizes(name):
    small = pictures(channels=1, size=9)[:, :, :, :8].contiguous()
    found = corrupt(small, name, 3)
    assert found.shape == small.shape and (found != small).any()


RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "snow", "fog", "elastic_transform"}


@pytest.mark.parametrize("name", GENERATED)
def test_seeds_matter_where_numbers_are_drawn(name):
    same = torch.equal(corrupt(X, name, 4, seed=0), corrupt(X, name, 4, seed=1))
    assert same == (name not in RANDOM)


GREY = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)


def spread(name, severity):
    return (corrupt(GREY, name, severity).double() / 255).std().item()


def test_noise_has_the_deviation_of_its_setting():
    level = 128 / 255
    assert spread("gaussian_noise", 1) == pytest.approx(0.04, rel=0.03)
    assert spread("speckle_noise", 5) == pytest.approx(0.2 * level, rel=0.03)
    assert spread("shot_noise", 3) == pytest.approx((level / 100) ** 0.5, rel=0.03)
    hit = corrupt(GREY, "impulse_noise", 5)
    assert (hit != GREY).double().mean() == pytest.approx(0.07, abs=0.01) and set(hit.unique().tolist()) == {0, 128, 255}


@pytest.mark.parametrize("name", ["defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur", "glass_blur", "pixelate", "elastic_transform"])
def test_what_moves_pixels_leaves_a_flat_image(name):
    assert (corrupt(GREY, name, 5).int() - 128).abs().max() <= 1


def test_light_and_colour_against_their_formulas():
    x = X.permute(0, 2, 3, 1).numpy() / 255
    mean = x.mean((1, 2), keepdims=True)
    assert np.abs(corrupt(X, "contrast", 3).permute(0, 2, 3, 1).numpy() - 255 * ((x - mean) * 0.4 + mean)).max() <= 1
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    for name, change in (("brightness", lambda hsv: hsv + [0, 0, 0.3]), ("saturate", lambda hsv: hsv * [1, 2.5, 1] + [0, 0.2, 0])):
        want = 255 * hsv_to_rgb(np.clip(change(rgb_to_hsv(x)), 0, 1))
        assert np.abs(corrupt(X, name, 5).permute(0, 2, 3, 1).numpy() - want).max() <= 1
    assert (corrupt(torch.zeros_like(GREY), "brightness", 5) == int(0.3 * 255)).all()


def test_jpeg_and_pixels_are_pillows():
    file = io.BytesIO()
    Image.fromarray(X[1].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=50)
    assert np.array_equal(corrupt(X, "jpeg_compression", 4)[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(file)))
    small = Image.fromarray(X[1].permute(1, 2, 0).numpy()).resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(corrupt(X, "pixelate", 5)[1].permute(1, 2, 0).numpy(), np.asarray(small))


def test_an_elastic_transform_without_shift_is_the_image():
    x = X[0].permute(1, 2, 0).numpy() / 255
    assert np.allclose(generate.elastic_transform(x, (0, 0, 0), np.random.default_rng(0)), x, atol=1e-12)


def test_a_zoom_and_a_motion_that_do_nothing():
    x = X[0].permute(1, 2, 0).numpy() / 255
    assert np.allclose(generate._zoom(x, 1.0), x)
    assert np.allclose(generate._motion(x, 3, 1e-3, 20.0), x)
    row = np.zeros((1, 9, 1))
    row[0, 6] = 1
    weights = np.exp(-0.5 * np.arange(5) ** 2)
    assert np.allclose(generate._motion(row, 2, 1.0, 0.0)[0, 2:7, 0], weights[::-1] / weights.sum())


@pytest.mark.parametrize(
    "change, error, wanted",
    [
        ({"corruption": "frost"}, ValueError, "read from files only"),
        ({"corruption": "fogg"}, ValueError, "Did you mean 'fog'"),
        ({"severity": 6}, ValueError, "from 1 to 5"),
        ({"seed": 0.5}, TypeError, "wanted an int"),
        ({"x": X.float() / 255}, TypeError, r"\(x \* 255\).round\(\).byte\(\)"),
        ({"x": X[:, :2]}, ValueError, "1 or 3"),
        ({"x": X[:, :1], "corruption": "saturate"}, ValueError, "3 channels"),
        ({"indices": [1]}, ValueError, "one for each image"),
        ({"indices": [-1, 0, 1, 2]}, ValueError, "from 0"),
    ],
)
def test_what_cannot_be_generated_is_told(change, error, wanted):
    with pytest.raises(error, match=wanted):
        corrupt(**{"x": X, "corruption": "fog", "severity": 1, **change})


@pytest.mark.parametrize("module", NEEDS_LIBRARY)
def test_a_missing_library_is_told(module, monkeypatch):
    real = builtins.__import__
    for name in [name for name in sys.modules if name.partition(".")[0] == module.partition(".")[0]]:
        monkeypatch.delitem(sys.modules, name)

    def absent(name, *rest):
        if name.partition(".")[0] == module.partition(".")[0]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr("importlib.import_module", lambda name: absent(name))
    with pytest.raises(ImportError, match=r"is not installed; install it with: pip install 'fastsnn\[corruptions\]'"):
        corrupt(X, NEEDS_LIBRARY[module], 1)
    assert corrupt(X, "gaussian_noise", 1).shape == X.shape


def test_accuracy_by_corruption_and_severity():
    x, y = digits(200)
    x = (x * 255).byte()
    model = network("snn")
    rows = corruptions.evaluate(model, generated(x, y, ["gaussian_noise", "contrast"], severities=(1, 5), seed=3))
    assert [(row.corruption, row.severity) for row in rows] == [(name, severity) for name in ("gaussian_noise", "contrast") for severity in (1, 5)]
    for row in rows:
        with torch.no_grad():
            right = model(corrupt(x, row.corruption, row.severity, seed=3) / 255).argmax(1) == y
        assert row.accuracy == right.double().mean().item() and row.interval[0] < row.accuracy < row.interval[1] and row.total == 200
    noise, contrast = rows[:2], rows[2:]
    mean = ((noise[0].accuracy + noise[1].accuracy) / 2 + (contrast[0].accuracy + contrast[1].accuracy) / 2) / 2
    assert corruptions.mean_accuracy(rows) == pytest.approx(mean)
    assert contrast[1].accuracy < contrast[0].accuracy
    lines = corruptions.table(rows).splitlines()
    assert len(lines) == 4 and lines[0].split() == ["1", "5", "mean"] and f"{mean:.2%}" in lines[-1]
    assert len({len(line) for line in lines}) == 1
    assert rows[0].to_dict()["interval"] == list(rows[0].interval)
    with pytest.raises(ValueError, match="got no row"):
        corruptions.mean_accuracy([])


def test_sets_of_a_folder_are_its_files(folder):
    y = torch.tensor([3, 1, 4, 1])
    found = corruptions.sets(folder, X, y, severities=[5, 2, 5], classes=5)
    assert [(one.corruption, one.severity) for one in found] == [(name, severity) for name in ("fog", "contrast", "own_one") for severity in (2, 5)]
    for one in found:
        x, labels = corruptions.read(folder, one.corruption, one.severity)
        places = torch.tensor([3, 0])
        assert torch.equal(one.take(places), x[places]) and torch.equal(one.labels, labels)
    few = corruptions.sets(folder, X, y, limit=2)[0]
    assert len(few.labels) == 2 and set(few.labels.tolist()) <= {1, 3, 4} and few.take(torch.tensor([0, 1])).shape == (2, 3, 32, 32)
    before, key = corruptions.fingerprint(folder), found[0].key
    images = np.load(folder / "fog.npy")
    np.save(folder / "fog.npy", images + 1)
    assert corruptions.fingerprint(folder) != before and corruptions.sets(folder, X, y)[0].key != key


def test_generated_sets_are_those_of_the_images():
    y = torch.arange(COUNT)
    found = corruptions.sets("generated", X, y, severities=[3], seed=5)
    assert [one.corruption for one in found] == list(GENERATED) and all(one.labels is y for one in found)
    snow = next(one for one in found if one.corruption == "snow")
    assert torch.equal(snow.take(torch.tensor([1, 3])), corrupt(X, "snow", 3, seed=5)[[1, 3]]) and corruptions.fingerprint("generated") is None
    assert snow.key != corruptions.sets("generated", X, y, severities=[3], seed=6)[0].key


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"severities": [0]}, "from 1 to 5"),
        ({"severities": []}, "severities is empty"),
        ({"x": X[:, :1]}, r"\[3, 32, 32\], the test images are \[1, 32, 32\]"),
        ({"classes": 4}, "holds class number 4, the model tells 4 classes apart"),
        ({"where": "nowhere"}, "is not a folder"),
        ({"where": "generate"}, "Did you mean 'generated'"),
        ({"where": "generated", "x": X.float() / 255}, "wanted uint8"),
    ],
)
def test_sets_that_cannot_be_are_told_at_once(folder, change, wanted):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=wanted):
        corruptions.sets(**{"where": folder, "x": X, "y": torch.zeros(COUNT, dtype=torch.int64), **change})


def test_an_evaluation_resumes_corruptions(folder, tmp_path):
    """And refuses other ones; more or fewer images than the clean ones have are taken."""
    model, y = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 5)), torch.tensor([3, 1, 4])
    some = corruptions.sets(folder, X, y, severities=[1, 4])
    found = evaluation.evaluate(model, X[:3], y, {}, 2, resume=tmp_path / "part", corruptions=some)
    plain = corruptions.evaluate(model, corruptions.from_folder(folder, severities=[1, 4]))
    assert found.corruptions == plain and found.worst().correct == found.results["clean"].correct and list(found.results) == ["clean"]
    saved = found.to_dict()["corruptions"]
    assert [corruptions.CorruptionResult.from_dict(row) for row in saved["rows"]] == plain and saved["mean"] == corruptions.mean_accuracy(plain)
    dead = [dataclasses.replace(one, take=None) for one in some]  # nothing is taken again
    assert evaluation.evaluate(model, X[:3], y, {}, 2, resume=tmp_path / "part", corruptions=dead) == found
    with pytest.raises(evaluation.ResumeError):
        evaluation.evaluate(model, X[:3], y, {}, 2, resume=tmp_path / "part", corruptions=some[:-1])
    with pytest.raises(TypeError, match="corruptions holds a tuple; wanted what fastsnn.corruptions.sets returned"):
        evaluation.evaluate(model, X[:3], y, {}, corruptions=[("fog", 1, X, y)])


def test_generated_leaves_out_what_does_not_suit():
    assert [name for name, *_ in generated(X[:1, :1], torch.zeros(1, dtype=torch.int64), severities=(1,))] == [name for name in GENERATED if name != "saturate"]
