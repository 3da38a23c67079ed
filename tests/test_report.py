"""`fastsnn report`: what it reads, what it draws, what it says where something is missing."""

import base64
import dataclasses
import errno
import io
import json
import re
import shutil
from html.parser import HTMLParser

import fastsnn
import numpy as np
import pytest
import torch
from fastsnn import checkpoints, pictures, surrogates
from fastsnn.__main__ import main
from fastsnn.data import load
from fastsnn.evaluation import diagnose, make_suite
from fastsnn.recipes import Config
from fastsnn.report import folders, membranes, page, report, table
from fastsnn.training import train

SMALL = dict(model="small_cnn", model_options={"widths": [8, 8, 8]}, data="digits", steps=2, epochs=2, train_limit=640, batch_size=32, log_every=4, device="cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three trained and attacked runs: two that differ in the seed, and one without a defense."""
    base = tmp_path_factory.mktemp("runs")
    made = []
    for name, settings in (("mpd-seed0", {"defense": "mpd-sgr"}), ("mpd-seed1", {"defense": "mpd-sgr", "seed": 1}), ("vanilla", {})):
        made.append(train(Config(**SMALL, **settings, out=str(base / name)), progress=False))
        assert main(["attack", str(made[-1]), "--eps", "8/255", "2/255", "--limit", "40", "--quiet", "--device", "cpu"]) == 0
    return made


#: A picture of one pixel, for tests that are not about pictures.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def leave_out_drawing(patch) -> None:
    for name in ("against_eps", "curves", "layers_over_training", "membranes"):
        patch.setattr(pictures, name, lambda *_, **__: PIXEL)


@pytest.fixture
def blank(monkeypatch):
    leave_out_drawing(monkeypatch)


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """A report of all of them, without drawing."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_drawing(patch)
        return report(runs, tmp_path_factory.mktemp("report"), images=64, progress=False)


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    """A report of one run with its pictures, small ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "DPI", 50)
        return report(runs[:1], tmp_path_factory.mktemp("drawn"), images=64, progress=False)


@pytest.fixture
def copied(runs, tmp_path):
    """A run that a test may damage; its pictures need not be fine."""
    return shutil.copytree(runs[0], tmp_path / "runs" / "mpd")


class Checked(HTMLParser):
    """Reads a page; every element that is opened is closed in its turn."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"<{tag}> names an attribute twice"
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.seen if name == tag]

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def embedded(link: str) -> bytes:
    return base64.b64decode(link.removeprefix("data:image/png;base64,"))


# ---- the page ----------------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_accessible(written):
    found = Checked(written.read_text())
    assert found.all("html") == [{"lang": "en"}] and len(found.all("h1")) == len(found.all("main")) == len(found.all("title")) == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in found.all("meta")
    identifiers = [attributes["id"] for _, attributes in found.seen if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    assert {link["href"] for link in found.all("a")} == {f"#{name}" for name in identifiers}
    assert all(attributes["aria-labelledby"] in identifiers for attributes in found.all("section"))
    assert all(len(image["alt"]) > 40 for image in found.all("img"))
    assert "prefers-color-scheme: dark" in written.read_text()
    scopes = {attributes.get("scope") for attributes in found.all("th")}
    assert scopes == {"col", "colgroup", "row"}


def test_page_holds_its_pictures_in_light_and_dark(drawn):
    from matplotlib.image import imread

    found, folder = Checked(drawn.read_text()), drawn.parent
    light, dark = ([embedded(one[key]) for one in found.all(tag)] for tag, key in (("img", "src"), ("source", "srcset")))
    beside = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert sorted(beside) == ["accuracy-eps.png", "mpd-seed0-layers.png", "mpd-seed0-learning.png", "mpd-seed0-membranes.png"]
    assert sorted(light) == sorted(beside.values()) and len(dark) == len(light) and not set(light) & set(dark)
    assert sorted(re.findall(r"!\[.+?\]\((.+?)\)", (folder / "report.md").read_text())) == sorted(beside)
    for image in dark:
        corner = imread(io.BytesIO(image), format="png")[0, 0, :3]
        assert f"--paper: #{''.join(f'{round(float(value) * 255):02x}' for value in corner)}" in page.STYLE.partition("dark)")[2]


def test_every_run_has_its_pictures(written):
    names = ["accuracy-eps.png", *(f"{run}-{what}.png" for run in ("mpd-seed0", "mpd-seed1", "vanilla") for what in ("layers", "learning", "membranes"))]
    assert sorted(path.name for path in written.parent.glob("*.png")) == sorted(names)
    assert sorted(re.findall(r"!\[.+?\]\((.+?)\)", (written.parent / "report.md").read_text())) == sorted(names)


def test_names_are_escaped(copied, blank, tmp_path):
    name = 'a<b>&"c`|'
    report([copied.rename(copied.parent / name)], tmp_path / "out", images=4, progress=False)
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<b>" not in text and name in Checked(text).text
    assert all(re.fullmatch(r"[A-Za-z0-9._+-]+\.png", path.name) for path in (tmp_path / "out").glob("*.png"))


# ---- the table ---------------------------------------------------------------------------------------------------------------


def test_table_holds_the_results(runs, written):
    found = json.loads((written.parent / "table.json").read_text())
    both, alone = found["rows"]
    assert (both["name"], alone["name"]) == ("mpd", "vanilla") and [run["seed"] for run in both["runs"]] == [0, 1]
    attacks = [json.loads((run / "attacks-quick.json").read_text())["results"] for run in runs]
    for row in both["attacks"]:
        name = f"{row['attack'].lower().replace('-', '')}-{table.fraction(row['eps'])}"
        values = [attack[name]["accuracy"] for attack in attacks[:2]]
        assert row["accuracy"] == {"value": pytest.approx(np.mean(values)), "low": min(values), "high": max(values), "spread": "range"}
    assert [(row["attack"], table.fraction(row["eps"])) for row in both["attacks"]] == [("FGSM", "2/255"), ("FGSM", "8/255"), ("PGD-7", "2/255"), ("PGD-7", "8/255")]
    clean = attacks[2]["clean"]
    assert alone["clean"] == {"value": clean["accuracy"], "low": clean["interval"][0], "high": clean["interval"][1], "spread": "interval"}
    document = checkpoints.read_run(runs[2])
    assert alone["parameters"]["value"] == document["parameters"] and alone["steps"]["value"] == 2 and alone["epochs"]["value"] == 2
    assert alone["seconds"]["value"] == document["seconds"]


def test_table_is_written_in_both_forms(runs, written):
    html_text, markdown = Checked(written.read_text()).text, (written.parent / "report.md").read_text()
    rows = {row["name"]: row for row in json.loads((written.parent / "table.json").read_text())["rows"]}
    pgd = next(row["accuracy"] for row in rows["vanilla"]["attacks"] if row["attack"] == "PGD-7" and row["eps"] > 0.02)
    value, low, high = (f"{100 * pgd[key]:.1f}" for key in ("value", "low", "high"))
    assert f"{value}{low} – {high}" in html_text and f"{value} ({low} – {high})" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")][:4]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1 and "PGD-7, 8/255" in lines[0]
    assert "2 seeds: 0, 1" in html_text and "mean and, beneath, the range over seeds" in html_text


def test_omega_and_rate_are_those_of_the_best_weights_on_test_images(runs, written):
    model, run = checkpoints.load_run(runs[2])
    test = load("digits").limited(test=64).x_test
    wanted = diagnose(model, test, gamma=run["config"]["gamma"])
    found = json.loads((written.parent / "table.json").read_text())
    for row, layer in zip(found["layers"]["vanilla"], wanted, strict=True):
        assert row["name"] == layer.name
        for key in ("omega", "mean", "rate"):
            assert row[key] == pytest.approx(getattr(layer, key), rel=1e-4, abs=1e-6)
    row = next(row for row in found["rows"] if row["name"] == "vanilla")
    assert row["omega"]["value"] == pytest.approx(np.mean([layer.omega for layer in wanted]), rel=1e-4)


def test_omega_of_all_runs_is_of_one_window(runs, copied, blank, tmp_path):
    """That of the run with mpd-sgr, also for a run that was trained with another, and for none that was only logged."""
    document = checkpoints.read_run(copied)
    document["config"]["gamma"] = 0.5
    checkpoints.write_json(copied / "run.json", document)
    path = report([runs[2], copied], tmp_path / "out", images=64, progress=False)
    found = json.loads((path.parent / "table.json").read_text())
    test = load("digits").limited(test=64).x_test
    for row, run in zip(found["rows"], (runs[2], copied), strict=True):
        wanted = np.mean([layer.omega for layer in diagnose(checkpoints.load_run(run)[0], test, gamma=0.5)])
        assert row["omega"]["value"] == pytest.approx(wanted, rel=1e-4) and row["gamma"] == 0.5
    assert "within ±0.5 of the threshold" in Checked(path.read_text()).text and "Omega within +-0.5" in table.text_table(found["rows"])

    bare = shutil.copytree(runs[2], tmp_path / "bare")
    for file in bare.glob("*.safetensors"):
        file.unlink()
    path = report([bare, copied], tmp_path / "out", images=64, progress=False)
    assert "bare: the Ω of its log is of the window ±1, not ±0.5" in text_of(path)
    row = json.loads((path.parent / "table.json").read_text())["rows"][0]
    assert row["omega"] is None and row["rate"]["value"] > 0


def attacked_otherwise(run, **changes):
    """Rewrite a run's results: `weights` of the file, anything else of each attack."""
    document = json.loads((run / "attacks-quick.json").read_text())
    document["weights"]["file"] = f"{changes.pop('weights', 'best')}.safetensors"
    document["settings"].pop("weights")
    for name, row in document["results"].items():
        row["total"] = changes.get("total", row["total"])
        if name != "clean":
            row["attack"] |= {key: value for key, value in changes.items() if key in row["attack"]}
    checkpoints.write_json(run / "attacks-quick.json", document)


@pytest.mark.parametrize(
    "changes, own, others",
    [
        ({"weights": "last"}, "weights: last", "weights: best"),
        ({"total": 1000}, "1,000 test images", "40 test images"),
        ({"step_size": 0.01}, "PGD-7 in steps of 0.01", "PGD-7 in steps of 2.5ε/7"),
        ({"step_size": 2 / 255}, "PGD-7 in steps of 2/255", "PGD-7 in steps of 2.5ε/7"),
        ({"eot": 10}, "EoT 10", "EoT 1"),
    ],
)
def test_runs_that_were_attacked_otherwise_say_so(runs, copied, changes, own, others):
    attacked_otherwise(copied, **changes)
    groups = table.group_runs(folders.read_all([runs[2], copied]))
    page_table = table.table(groups)
    assert [row[0].note.rpartition(" · ")[2] for row in page_table.rows] == [others, own]
    assert own not in page_table.caption and others not in page_table.caption
    first, second = table.differences(groups)
    assert first.startswith("vanilla was attacked otherwise") and others in first and own in second
    lines = table.text_table(table.rows_of(groups)).replace("*eps", "ε").splitlines()
    assert lines[-2:] == [f"vanilla: {others}", f"mpd: {own}"]


def test_how_all_runs_were_attacked_is_said_once(runs):
    groups = table.group_runs(folders.read_all(runs))
    assert "In all rows: weights: best, 40 test images, PGD-7 in steps of 2.5ε/7." in table.table(groups).caption and not table.differences(groups)
    lines = table.text_table(table.rows_of(groups)).splitlines()
    assert lines[0].split()[-1] == "epochs" and [line.split()[-1] for line in lines[1:4]] == ["2", "2", "2"]
    assert lines[4:] == ["", "weights: best; 40 test images; PGD-7 in steps of 2.5*eps/7; Omega within +-1 of the threshold"]


def test_seeds_that_were_attacked_otherwise(runs, tmp_path):
    """In one row, and yet told apart."""
    other = shutil.copytree(runs[1], tmp_path / runs[1].name)
    attacked_otherwise(other, total=20)
    (group,) = table.group_runs(folders.read_all([runs[0], other]))
    assert table.table([group]).rows[0][0].note.endswith("2 seeds: 0, 1 · seed 0: 40 test images · seed 1: 20 test images")


@pytest.mark.parametrize("eps", ["8/255", "0.05", "1e-5", "0.5/255", 0, 1])
def test_names_of_attacks_of_any_size(eps):
    attacks = make_suite("quick", [eps])
    rows = {name: {"accuracy": 1.0, "attack": {"name": attack.name, **attack.options()}} for name, attack in attacks.items()}
    found = folders._rows({"results": rows})
    assert [(row.attack, row.eps) for row in found] == [(label, attack.eps) for label, attack in zip(("FGSM", "PGD-7"), attacks.values())]


@pytest.mark.parametrize(
    "names, wanted",
    [
        (["mpd-seed0", "mpd-seed1"], "mpd"),
        (["a/s0", "a/s1"], "a"),
        (["vgg_s=1", "vgg_s=12"], "vgg"),
        (["first", "second"], "first and others"),
        (["only-seed0"], "only-seed0"),
        (["mpd", "mpd2"], "mpd"),
    ],
)
def test_name_of_a_group(names, wanted):
    assert table._name(names) == wanted


def test_runs_share_a_row_only_where_nothing_but_the_seed_differs(runs):
    first, second, vanilla = folders.read_all(runs)
    assert [len(group.runs) for group in table.group_runs([first, vanilla, second])] == [2, 1]
    for change in ({"eta": 0.1}, {"steps": 4}):
        other = dataclasses.replace(second, document=second.document | {"config": second.config | change})
        assert [len(group.runs) for group in table.group_runs([first, other])] == [1, 1]
    other = dataclasses.replace(second, document=second.document | {"data": second.document["data"] | {"fingerprint": "0"}})
    assert len(table.group_runs([first, other])) == 2


@pytest.mark.parametrize("seconds, wanted", [(3.21, "3.2 s"), (42, "42 s"), (100, "2 min"), (5940, "99 min"), (11100, "3 h 05 min")])
def test_duration(seconds, wanted):
    assert table.duration(seconds) == wanted


@pytest.mark.parametrize("eps, wanted", [(8 / 255, "8/255"), (0.1, "0.1"), (1.0, "255/255"), (0.001, "0.001")])
def test_fraction(eps, wanted):
    assert table.fraction(eps) == wanted


# ---- membranes ---------------------------------------------------------------------------------------------------------------


class Stack(torch.nn.Module):
    """Two layers with tensors for thresholds, one that draws random numbers, and a readout that never fires."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fastsnn.LIF(decay=0.5, threshold=torch.tensor([0.5, 1.0, 1.5]), steps=3)
        self.second = fastsnn.LIF(decay=0.9, threshold=torch.linspace(0.5, 1, 12).view(1, 3, 2, 2), surrogate=surrogates.Rectangle(0.5))
        self.random = fastsnn.NoisyLIF(0.4)
        self.readout = fastsnn.LI(0.5)

    def forward(self, x):
        return self.readout(self.random(3 * self.second(2 * self.first(x[None])))).mean(0).flatten(1)


def test_measured_membranes_are_those_of_the_network():
    images = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2
    model = Stack()
    model.first.eval()
    state = torch.get_rng_state()
    found = membranes.measure(model, images, gamma=0.7, batch_size=4)
    assert torch.equal(state, torch.get_rng_state()) and model.training and not model.first.training
    assert [layer.name for layer in found] == ["first", "second", "random"]
    x = images[None]
    for layer, module, threshold in ((found[0], model.first, model.first.threshold.view(3, 1, 1)), (found[1], model.second, model.second.threshold[:, None])):
        out = module.simulate(x, statistics=("mean", "var", "rate"), keep=("membrane",))
        z = (out.membrane - threshold).double()
        counts, _ = np.histogram(z.float().numpy(), layer.edges)
        np.testing.assert_allclose(layer.density * np.diff(layer.edges) * z.numel(), counts, atol=1.01)  # a value on an edge
        assert layer.inside == (z.abs() < 0.7).double().mean().item()
        assert layer.mean == pytest.approx(z.mean().item(), rel=1e-5) and layer.deviation == pytest.approx(z.std(correction=0).item(), rel=1e-5)
        assert layer.rate == pytest.approx(out.spikes.mean().item(), rel=1e-6)
        assert layer.omega == pytest.approx(fastsnn.defenses.omega(out.statistics.mean, out.statistics.var, 0.7).mean().item(), rel=1e-4)
        x = 2 * out.spikes
    assert (found[0].half_width, found[1].half_width) == (1.0, 0.25) and found[2].half_width == pytest.approx(0.4 * (2 * np.log(2)) ** 0.5)
    assert found[2].rate == membranes.measure(model, images, gamma=0.7, batch_size=4)[2].rate


def test_omega_is_the_share_of_the_drawn_gaussians_in_the_window():
    tally = membranes._Tally(low=-1.0, high=1.0, counts=np.ones(membranes.BINS), total=membranes.BINS)
    for _ in range(2):
        tally.moments(torch.tensor([[0.2, -1.0]]), torch.tensor([[0.3, 2.0]]), torch.zeros(1, 2), 5)
    layer = fastsnn.LIF()
    wanted = fastsnn.defenses.omega(torch.tensor([0.2, -1.0]), torch.tensor([0.3, 2.0])).mean().item()
    drawn = membranes._layer("one", layer, tally, 1.0, wanted)
    assert float((drawn.mixture * np.diff(drawn.edges)).sum()) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("name", surrogates.BY_NAME)
def test_window_of_every_surrogate(name):
    layer = fastsnn.LIF(surrogate=surrogates.BY_NAME[name]())
    derivative, half = membranes.surrogate_of(layer)
    peak = float(derivative(np.zeros(1))[0])
    if half == float("inf"):
        assert float(derivative(np.array([1e6]))[0]) > peak / 2
        return
    before, after = (float(derivative(np.array([z]))[0]) for z in (half * (1 - 1e-4), half * (1 + 1e-4)))
    assert (before > 0 and after == 0) or (before > peak / 2 > after)


@pytest.mark.parametrize(
    "layer, wanted",
    [
        (fastsnn.LIF(surrogate=surrogates.Triangle(2.0)), 2.0),
        (fastsnn.LIF(surrogate=surrogates.Triangle(torch.tensor([1.0, 3.0]))), 2.0),
        (fastsnn.LIF(surrogate=surrogates.Triangle(1.0, relative=True), threshold=0.5), 0.5),
        (fastsnn.LIF(surrogate=surrogates.ATan(2.0)), 1 / np.pi),
    ],
)
def test_window_in_units_of_potential(layer, wanted):
    assert membranes.surrogate_of(layer)[1] == pytest.approx(wanted, rel=1e-6)


# ---- pictures ----------------------------------------------------------------------------------------------------------------


def test_pictures_repeat_whatever_the_user_s_settings(monkeypatch):
    import matplotlib

    monkeypatch.setattr(pictures, "DPI", 40)
    panels = [pictures.Panel("one", "potential", [pictures.Curve("a", [1, 2], [0.1, 0.3]), pictures.Curve("b", [1], [2.0])])]
    first = pictures.curves(panels)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert pictures.curves(panels) == first
        assert matplotlib.rcParams["font.size"] == 30
    assert pictures.curves(panels, dark=True) != first


def test_pictures_of_odd_data(monkeypatch):
    """One point, one value, an endless window, a bar far above the rest, many runs."""
    monkeypatch.setattr(pictures, "DPI", 40)
    density = np.full(8, 0.01)
    density[1] = 50.0
    layer = pictures.Layer("x", np.linspace(-2, 2, 9), density, density, 0.0, 1e-6, 0.5, 0.5, 0.0, 1.0, float("inf"), np.ones_like)
    point = pictures.Curve("x", [1], [0.5])
    lines = [pictures.Curve(f"run {i}", [0.0, 8 / 255], [0.9, i / 30], [0.8, 0.0], [1.0, 0.9]) for i in range(20)]
    found = [pictures.membranes([layer]), pictures.layers_over_training([pictures.Panel("", "", [point])])]
    found.append(pictures.against_eps({"FGSM": [None, *lines]}, [f"{i}" for i in range(21)], 0.1))
    for png in found:
        assert png.startswith(b"\x89PNG") and len(png) > 1000


# ---- what is missing, what is wrong ------------------------------------------------------------------------------------------


def text_of(path) -> str:
    found = Checked(path.read_text()).text
    assert "What is missing" in found
    return found


def test_run_that_has_only_begun(copied, blank, tmp_path):
    for file in copied.iterdir():
        if file.name != "run.json":
            file.unlink()
    found = text_of(report([copied], tmp_path / "out", images=4, progress=False))
    assert f"fastsnn train --resume --out {copied}" in found and "no checkpoint" in found and "the log is empty" in found
    assert f"fastsnn attack {copied} --suite quick --eps 2/255 8/255" in found
    row = json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]
    assert row["clean"] is None and row["attacks"] == [] and row["omega"] is None and row["parameters"]["value"] > 0


def test_without_matplotlib(copied, tmp_path, monkeypatch):
    def missing(module, extra):
        raise ImportError(f"{module} is not installed; install it with: pip install 'fastsnn[{extra}]'")

    monkeypatch.setattr(pictures, "need", missing)
    found = text_of(report([copied], tmp_path / "out", images=4, progress=False))
    assert found.count("pip install 'fastsnn[train]'") == 1 and not list((tmp_path / "out").glob("*.png"))
    assert "PGD-7" in found and "Membranes by layer" in found


def damage_checkpoint(run):
    (run / "best.safetensors").write_bytes((run / "best.safetensors").read_bytes()[:500])
    return "the weights cannot be loaded"


def damage_attacks(run):
    (run / "attacks-quick.json").write_text('{"results": {"clean": {}}}')
    return f"attacks-quick.json cannot be read. fastsnn attack {run} --suite quick --again"


def other_weights(run):
    tensors, state = checkpoints.load(run / "best.safetensors")
    checkpoints.save(run / "best.safetensors", {name: tensor + 1 for name, tensor in tensors.items()}, state)
    return "attacks-quick.json is of other weights than best.safetensors holds now"


def interrupted_attack(run):
    for end in ("part", "json.part", "part.123.part"):  # the others: what a killed process was writing
        (run / f"attacks-quick.{end}").write_text("{}")
    return f"an attack was interrupted (attacks-quick.part); fastsnn attack {run} --suite quick with the other options"


def data_gone(run):
    document = json.loads((run / "run.json").read_text())
    document["config"]["data"] = "/nowhere/cifar10.npz"
    checkpoints.write_json(run / "run.json", document)
    return "--data PATH"


def unfinished(run):
    document = json.loads((run / "run.json").read_text())
    checkpoints.write_json(run / "run.json", document | {"finished": False})
    return "the training is not finished"


@pytest.mark.parametrize("harm", [damage_checkpoint, damage_attacks, other_weights, interrupted_attack, data_gone, unfinished])
def test_what_is_wrong_in_a_run_is_said(harm, copied, blank, tmp_path):
    wanted = harm(copied)
    assert text_of(report([copied], tmp_path / "out", images=4, progress=False)).count(wanted) == 1


def test_data_can_lie_elsewhere(copied, blank, tmp_path):
    path = load("digits").save(tmp_path / "moved.npz")
    data_gone(copied)
    assert "What is missing" not in Checked(report([copied], tmp_path / "out", data=str(path), images=4, progress=False).read_text()).text


def test_warnings_of_attacks_are_shown(copied, blank, tmp_path):
    document = json.loads((copied / "attacks-quick.json").read_text())
    checkpoints.write_json(copied / "attacks-quick.json", document | {"warnings": ["PGD finds less than FGSM"]})
    assert "mpd: PGD finds less than FGSM" in Checked(report([copied], tmp_path / "out", images=4, progress=False).read_text()).text


def test_network_without_spikes(blank, tmp_path):
    run = train(Config(**SMALL | {"epochs": 1, "steps": 1}, neuron="relu", norm="bn", out=str(tmp_path / "ann")), progress=False)
    found = text_of(report([run], tmp_path / "out", images=4, progress=False))
    assert "Membranes" not in found and "pictures of membranes" not in found and "fastsnn attack" in found


def test_log_with_odd_lines(runs):
    run = folders.read_all(runs[:1])[0]
    lines = [
        {"kind": "epoch", "epoch": 0, "step": 3, "loss": 2.0},
        {"kind": "epoch", "epoch": 1, "step": 8, "loss": float("nan")},
        {"kind": "epoch", "epoch": 0, "step": 4, "loss": 1.5, "mpd-sgr": 0.1},
        {"kind": "validation", "epoch": 0, "layers": {"name": ["a", "b"], "omega": [0.1, None]}},
        {"other": 1},
    ]
    run = dataclasses.replace(run, log=lines)
    assert run.curve("x", "epoch", "loss") == pictures.Curve("x", [1], [1.5])
    assert run.curve("x", "epoch", "nothing") is None and run.terms() == ["mpd-sgr"] and run.epochs == 2
    assert run.layer_curves("omega") == [pictures.Curve("a", [1], [0.1])]


@pytest.mark.parametrize(
    "wrong, says",
    [
        ("mdp", "does not exist; wanted a folder that `fastsnn train` wrote. Did you mean '{base}/mpd'?"),
        ("mpd/log.jsonl", "is no run folder: it has no run.json; wanted a folder that `fastsnn train` wrote. Did you mean '{base}/mpd'?"),
        ("", "is no run folder itself; it holds the runs mpd. Name those: fastsnn report {base}/*"),
    ],
)
def test_folder_that_is_no_run(copied, tmp_path, wrong, says):
    with pytest.raises(FileNotFoundError) as error:
        report([copied.parent / wrong], tmp_path / "out", progress=False)
    assert says.format(base=copied.parent) in str(error.value) and not (tmp_path / "out").exists()


def test_wrong_arguments(copied, tmp_path):
    with pytest.raises(ValueError, match="no run is named"):
        report([], tmp_path)
    with pytest.raises(ValueError, match="images is 0; wanted an int >= 1"):
        report([copied], tmp_path, images=0)
    with pytest.raises(FileExistsError, match="is a file; wanted a folder"):
        report([copied], copied / "run.json")
    (copied / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        report([copied], tmp_path / "out", progress=False)


def test_same_folder_twice_and_same_names(runs, tmp_path):
    again = shutil.copytree(runs[0], tmp_path / "again" / runs[0].name)
    assert [run.name for run in folders.read_all([runs[0], runs[0]])] == ["mpd-seed0"]
    assert [run.name for run in folders.read_all([runs[0], again])] == [f"{runs[0].parent.name}/mpd-seed0", "again/mpd-seed0"]


def test_full_disk_leaves_the_report_of_before(copied, blank, tmp_path, monkeypatch):
    path = report([copied], tmp_path / "out", images=4, progress=False)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert {file.name: file.read_bytes() for file in report([copied], tmp_path / "out", images=4, progress=False).parent.iterdir()} == before

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_open", full)
    with pytest.raises(OSError, match="no space left"):
        report([copied], tmp_path / "out", images=8, progress=False)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
