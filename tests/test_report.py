"""`fastsnn report`: what it reads, what it draws, what it says where something is missing."""

import base64
import dataclasses
import errno
import inspect
import io
import json
import re
import shutil
from html.parser import HTMLParser

import fastsnn
import fastsnn.activity
import numpy as np
import pytest
import torch
from fastsnn import checkpoints, landscapes, pictures
from fastsnn.__main__ import main
from fastsnn.corruptions import CorruptionResult
from fastsnn.data import Dataset, load
from fastsnn.evaluation import diagnose, make_suite
from fastsnn.recipes import Config
from fastsnn.report import attacked, draw, folders, networks, page, report, table
from fastsnn.training import train

SMALL = dict(model="small_cnn", model_options={"widths": [8, 8, 8]}, steps=2, epochs=2, batch_size=32, log_every=4, device="cpu")


#: The pictures of one run, by the ends of their names.
OF_A_RUN = ("attacked", "landscapes", "layers", "learning", "membranes", "under-attack")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Images of ten classes: a bright square in noise, at a place of each class's own."""
    labels, noise = torch.arange(200) % 10, torch.Generator().manual_seed(0)
    images = torch.randint(0, 100, (200, 1, 8, 8), generator=noise, dtype=torch.uint8)
    for image, label in zip(images, labels.tolist()):
        image[:, label // 2 : label // 2 + 3, 4 * (label % 2) : 4 * (label % 2) + 3] += 150
    made = Dataset("squares", images[:100], labels[:100], images[100:], labels[100:], tuple("abcdefghij"))
    return str(made.save(tmp_path_factory.mktemp("data") / "squares.npz"))


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """Three trained and attacked runs: two that differ in the seed, and one without a defense."""
    base = tmp_path_factory.mktemp("runs")
    made = []
    for name, settings in (("mpd-seed0", {"defense": "mpd-sgr"}), ("mpd-seed1", {"defense": "mpd-sgr", "seed": 1}), ("vanilla", {})):
        made.append(train(Config(**SMALL, **settings, data=source, out=str(base / name)), progress=False))
        assert main(["attack", str(made[-1]), "--eps", "8/255", "2/255", "--limit", "40", "--check-images", "0", "--quiet", "--device", "cpu"]) == 0
    return made


#: A picture of one pixel, for tests that are not about pictures.
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def leave_out_drawing(patch) -> None:
    """Pictures are asked for as ever, but not drawn."""

    def undrawn(signature):
        def draw(*given, **named) -> bytes:
            signature.bind(*given, **named)
            return PIXEL

        return draw

    for name in pictures.__all__:
        if name.islower() and name != "window":
            patch.setattr(pictures, name, undrawn(inspect.signature(getattr(pictures, name))))
    patch.setattr(attacked, "POINTS", 3)


@pytest.fixture
def blank(monkeypatch):
    leave_out_drawing(monkeypatch)


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """A report of all of them, without drawing."""
    with pytest.MonkeyPatch.context() as patch:
        leave_out_drawing(patch)
        return report(runs, tmp_path_factory.mktemp("report"), images=64, attacked=3, progress=False)


@pytest.fixture(scope="module")
def drawn(runs, tmp_path_factory):
    """A report of one run with its pictures, small ones, some of them the bare ground."""

    def ground(*_, dark: bool = False) -> bytes:
        with pictures.base.styled(dark):
            return pictures.base.png(pictures.base.figure_of(1, 1))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures.base, "DPI", 50)
        patch.setattr(pictures, "curves", lambda panels, x, dark: ground(dark=dark))
        patch.setattr(pictures, "layers_over_training", ground)
        return report(runs[:1], tmp_path_factory.mktemp("drawn"), images=64, attacked=0, progress=False)


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
    names = ["accuracy-eps.png", *(f"{run}-{what}.png" for run in ("mpd-seed0", "mpd-seed1", "vanilla") for what in OF_A_RUN)]
    assert sorted(path.name for path in written.parent.glob("*.png")) == sorted(names)
    assert sorted(re.findall(r"!\[.+?\]\((.+?)\)", (written.parent / "report.md").read_text())) == sorted(names)


def test_names_are_escaped(copied, blank, tmp_path):
    name = 'a<b>&"c`|'
    report([copied.rename(copied.parent / name)], tmp_path / "out", images=4, attacked=0, progress=False)
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


def test_omega_and_rate_are_those_of_the_best_weights_on_test_images(source, runs, written):
    model, run = checkpoints.load_run(runs[2])
    test = load(source).limited(test=64).x_test
    wanted = diagnose(model, test, gamma=run["config"]["gamma"])
    found = json.loads((written.parent / "table.json").read_text())
    for row, layer in zip(found["layers"]["vanilla"], wanted, strict=True):
        assert row["name"] == layer.name
        for key in ("omega", "mean", "rate"):
            assert row[key] == pytest.approx(getattr(layer, key), rel=1e-4, abs=1e-6)
    row = next(row for row in found["rows"] if row["name"] == "vanilla")
    assert row["omega"]["value"] == pytest.approx(np.mean([layer.omega for layer in wanted]), rel=1e-4)


def test_omega_of_all_runs_is_of_one_window(source, runs, copied, blank, tmp_path):
    """That of the run with mpd-sgr, also for a run that was trained with another, and for none that was only logged."""
    document = checkpoints.read_run(copied)
    document["config"]["gamma"] = 0.5
    checkpoints.write_json(copied / "run.json", document)
    path = report([runs[2], copied], tmp_path / "out", images=64, attacked=0, progress=False)
    found = json.loads((path.parent / "table.json").read_text())
    test = load(source).limited(test=64).x_test
    for row, run in zip(found["rows"], (runs[2], copied), strict=True):
        wanted = np.mean([layer.omega for layer in diagnose(checkpoints.load_run(run)[0], test, gamma=0.5)])
        assert row["omega"]["value"] == pytest.approx(wanted, rel=1e-4) and row["gamma"] == 0.5
    assert "within ±0.5 of the threshold" in Checked(path.read_text()).text and "Omega within +-0.5" in table.text_table(found["rows"])

    bare = shutil.copytree(runs[2], tmp_path / "bare")
    for file in bare.glob("*.safetensors"):
        file.unlink()
    path = report([bare, copied], tmp_path / "out", images=64, attacked=0, progress=False)
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
    found = folders.found_in({"results": rows}).results
    assert [(row.attack, row.eps) for row in found] == [(label, attack.eps) for label, attack in zip(("FGSM", "PGD-7"), attacks.values())]


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("apgd-ce100-8/255", "APGD-CE-100"),
        ("apgd-ce-assg100-8/255", "APGD-CE-ASSG-100"),
        ("ensemble-pgd7-8/255", "ensemble-PGD-7"),
        ("tapgd-dlr-8/255", "T-APGD-DLR"),
        ("mtpgd20-8/255", "MT-PGD-20"),
        ("square-8/255", "square"),
        ("transfer-mpd-seed0-8/255", "transfer from mpd-seed0"),
    ],
)
def test_names_of_attacks_are_those_of_the_papers(name, wanted):
    assert folders._label(name, {"eps": 8 / 255}) == wanted
    assert folders._label(name, {"eps": 8 / 255, "norm": "l2"}).startswith(wanted)


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


# ---- attacks -----------------------------------------------------------------------------------------------------------------


def suite_of(eps: str = "8/255", accuracy: float = 0.5) -> dict:
    """What an ensemble's evaluation writes, made up."""
    size, interval = fastsnn.attacks.parse_eps(eps), [0.4, 0.6]
    row = {"accuracy": accuracy, "interval": interval, "total": 40, "zero_gradient": 0.25, "skips": False}
    members = {"triangle-1": {"fooled": 20, "tried": 40, "accuracy": accuracy, "alone": accuracy}, "bptr": {"fooled": 4, "tried": 20, "accuracy": accuracy - 0.1, "alone": None}}
    left = {"accuracy": accuracy - 0.2, "skips": True, "tried": 16}
    return {
        "settings": {"suite": "ensemble"},
        "results": {
            "clean": {"accuracy": 0.9, "interval": [0.8, 1.0], "total": 40},
            f"pgd7-{eps}": row | {"attack": {"name": "pgd", "eps": size, "steps": 7, "norm": "linf"}},
            f"ensemble-fgsm-{eps}": row | {"attack": {"name": "ensemble", "eps": size, "norm": "linf"}, "members": members},
            f"square-{eps}": row | left | {"attack": {"name": "square", "eps": size, "norm": "linf"}},
            "cw": row | {"attack": {"name": "cw", "eps": "inf", "norm": "l2"}},
        },
        "worst_cases": {f"linf {eps}": {"accuracy": accuracy - 0.2, "interval": [0.2, 0.4], "total": 40}},
        "warnings": ["a sign"],
        "checks": [
            {"name": "iterative", "verdict": "ok", "text": "PGD finds more than FGSM", "figures": {"pgd": 0.5}},
            {"name": "noise", "verdict": "suspicious", "text": "a sign", "figures": {}},
            {"name": "twin", "verdict": "not tested", "text": "no twin is named", "figures": {}},
        ],
        "curves": {"eps": {}, "steps": {"pgd-8/255": [[1, 0.8, 0.7, 0.9], [7, accuracy, 0.4, 0.6]]}},
    }


def test_suites_are_read_and_shown(runs, copied, blank, tmp_path, monkeypatch):
    asked = {}
    for name in ("against_eps", "against_steps", "members"):
        monkeypatch.setattr(pictures, name, lambda *given, name=name, **_: asked.setdefault(name, given) and PIXEL)
    checkpoints.write_json(copied / "attacks-ensemble.json", suite_of())
    quick = suite_of()
    quick["results"] = {name: row for name, row in quick["results"].items() if name == "clean"}
    quick["worst_cases"] = {f"linf {eps}": {"accuracy": 0.4, "interval": [0.3, 0.5], "total": 40} for eps in ("2/255", "8/255")}
    checkpoints.write_json(copied / "attacks-quick.json", quick | {"checks": [], "curves": {}})
    path = report([copied, runs[2]], tmp_path / "out", images=4, attacked=0, progress=False)
    found, text = json.loads((path.parent / "table.json").read_text()), Checked(path.read_text()).text

    mine, other = found["rows"]
    assert [(row["attack"], table.fraction(row["eps"])) for row in mine["worst"]] == [("worst case", "2/255"), ("worst case", "8/255")]
    assert mine["worst"][1]["accuracy"] == {"value": 0.3, "low": 0.2, "high": 0.4, "spread": "interval"}  # the lower of two suites
    # What met only what was left, and what has no bound, is no column; it is told in the run's own table.
    assert {row["attack"] for row in mine["attacks"] if row["accuracy"]} == {"PGD-7", "ensemble-FGSM"}
    (run,) = folders.read_all([copied])
    left = {row[0].text: [cell.text for cell in row[1:]] for row in table.attack_table(run).rows}
    assert left["square"] == ["8/255", "16", "30.0", "25.0"] and left["CW (l2)"] == ["∞", "40", "50.0", "25.0"] and left["clean"] == ["–", "40", "90.0", "–"]
    assert "Every attack. Some met only the images that no earlier one had fooled" in text
    # Worst cases stand beside the clean accuracy, before single attacks.
    assert [column.name for column in table.table(table.group_runs(folders.read_all([copied]))).columns][:4] == ["run", "clean", "2/255", "8/255"]
    header = table.text_table(found["rows"]).splitlines()[0].split("  ")
    assert [cell.strip() for cell in header if cell][:3] == ["clean", "worst case 2/255", "worst case 8/255"]

    assert "✓ ok" in text and "✗ suspicious" in text and "– not tested" in text and "mpd: a sign" in text
    assert "ensemble, twin: not tested; no twin is named" in text
    assert {check["name"]: check["verdict"] for check in mine["runs"][0]["checks"] if check["suite"] == "ensemble"} == {"iterative": "ok", "noise": "suspicious", "twin": "not tested"}

    panels, labels, _, _ = asked["against_eps"]
    assert labels == ["mpd", "vanilla"] and panels["worst case"][0].x == [0.0, 2 / 255, 8 / 255] and panels["worst case"][0].y[-1] == 0.3
    assert panels["ensemble-FGSM"] == [pictures.Curve("mpd", [0.0, 8 / 255], [0.9, 0.5], [0.8, 0.4], [1.0, 0.6]), None]
    assert asked["against_steps"][0] == {"PGD, ε 8/255": [pictures.Curve("mpd", [1, 7], [0.8, 0.5], [0.7, 0.4], [0.9, 0.6]), None]}
    assert asked["members"][:3] == (["triangle-1", "bptr"], ["8/255"], [pictures.Bars("mpd", [[0.5, 0.4]], [[0.5, None]])])
    assert "50.0 % after the first and 40.0 % after all at 8/255" in (path.parent / "report.md").read_text()


def test_corruptions_and_activity_are_shown(runs, copied, blank, tmp_path):
    layers = [fastsnn.activity.LayerActivity(name, 8, 4, spikes, spikes / 32, 0.25, 0.125) for name, spikes in (("first", 6.0), ("second", 2.0))]
    said = {"totals": fastsnn.activity.totals(layers), "layers": [layer.to_dict() for layer in layers]}
    distance = [fastsnn.activity.LayerDistance(name, 1.5, 0.5, 0.1).to_dict() for name in ("first", "second")]
    quick = suite_of() | {"activity": {"images": 64, "clean": said, "attacked": {"attack": "pgd7-8/255", **said, "distance": distance}}}
    checkpoints.write_json(copied / "attacks-quick.json", quick)
    rows = [CorruptionResult(name, severity, 0.8 - severity / 10, (0.1, 0.9), 40).to_dict() for name in ("fog", "jpeg_compression") for severity in (1, 5)]
    other = suite_of() | {"corruptions": {"source": "CIFAR-10-C", "mean": 0.5, "rows": rows}, "activity": {"images": 64, "clean": said}}
    checkpoints.write_json(copied / "attacks-ensemble.json", other)
    (copied / "attacks-ensemble+corruptions.part").write_text("{}")
    path = report([copied, runs[2]], tmp_path / "out", images=4, attacked=0, progress=False)
    markdown, text = (path.parent / "report.md").read_text(), Checked(path.read_text()).text
    lines = [line.replace("\\", "") for line in markdown.splitlines() if line.startswith("|")]
    assert "| jpeg compression | 70.0 (10.0 – 90.0) | 30.0 (10.0 – 90.0) | 50.0 |" in lines and "| mean of all | 70.0 | 30.0 | 50.0 |" in lines
    assert "on 40 images: the files of CIFAR-10-C." in text
    assert "| first | 8 | 0.750 | 18.8 | 25.0 | 12.5 | 0.750 | 18.8 | 25.0 | 12.5 | 1.50 | 50.0 |" in lines, "of the file that knows attacked images too"
    assert "| all | 16 | 0.500 | 12.5 | 25.0 | 12.5 | 0.500 | 12.5 | 25.0 | 12.5 | – | – |" in lines and "under PGD-7, 8/255" in text
    assert text.count("Activity of the spiking layers") == text.count("under common corruptions") == 1, "the other run has none"
    assert f"fastsnn attack {copied} --suite ensemble with the other options of then" in text
    told = json.loads((path.parent / "table.json").read_text())["rows"][0]["runs"][0]
    assert told["corruptions"]["mean"] == 0.5 and told["activity"]["attack"] == "PGD-7, 8/255"
    checkpoints.write_json(copied / "attacks-ensemble.json", suite_of() | {"activity": {"images": 8, "missing": "why"}})
    (run,) = folders.read_all([copied])
    assert run.corruptions is None and table.corruption_table(run) is None and run.activity.images == 64
    checkpoints.write_json(copied / "attacks-ensemble.json", suite_of() | {"corruptions": {"rows": []}})
    assert any("attacks-ensemble.json cannot be read" in sentence for sentence in folders.read_all([copied])[0].missing)


def test_members_and_steps_of_seeds_are_means(runs, tmp_path):
    folder, given = tmp_path / "runs", {}
    for run, accuracy in zip(runs[:2], (0.5, 0.7)):
        checkpoints.write_json(shutil.copytree(run, folder / run.name) / "attacks-ensemble.json", suite_of(accuracy=accuracy))
    (group,) = table.group_runs(folders.read_all(sorted(folder.iterdir())))
    studio = draw.Studio()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("members", "against_steps"):
            patch.setattr(pictures, name, lambda *arguments, name=name: given.setdefault(name, arguments) and PIXEL)
        assert len(studio.members([group])) == len(studio.against_steps([group])) == 1
    (bars,) = given["members"][2]
    assert bars.title == "mpd (2 seeds)" and bars.standing == [[pytest.approx(0.6), pytest.approx(0.5)]] and bars.alone == [[pytest.approx(0.6), None]]
    (curve,) = given["against_steps"][0]["PGD, ε 8/255"]
    assert curve.y == [0.8, pytest.approx(0.6)] and (curve.low[1], curve.high[1]) == (0.5, 0.7)


def test_attacked_images_are_those_of_the_network(source, runs, written, monkeypatch):
    """The numbers beside the pictures, against the attack and the parts that they are made of."""
    monkeypatch.setattr(attacked, "POINTS", 3)
    model, _ = checkpoints.load_run(runs[2])
    test = load(source).limited(test=3)
    x, y = test.x_test.float() / 255, test.y_test
    found = attacked.attack(model, x, y, 8 / 255)
    adversarial = fastsnn.attacks.PGD("8/255", steps=7, seed=0)(model, x, y)
    with torch.no_grad():
        before, after = model.eval()(x).argmax(1), model(adversarial).argmax(1)
    for k, one in enumerate(found.examples):
        assert (one.label, one.before, one.after) == (int(y[k]), int(before[k]), int(after[k]))
        np.testing.assert_array_equal(one.adversarial, adversarial[k].numpy())
    gradient = landscapes.input_gradient(model, x, y)
    assert found.sparsity["zero"] == (gradient == 0).double().mean().item() and found.sparsity["l1"] == pytest.approx(gradient.abs().sum().item() / 3, rel=1e-5)
    assert [layer.distance for layer in found.distances["PGD-7"]] == [layer.distance for layer in fastsnn.activity.spike_distance(model, x, adversarial)]
    assert [one.space for one in found.surfaces] == ["pixels", "weights"] and found.surfaces[0].eps == 8 / 255
    told = json.loads((written.parent / "table.json").read_text())["attacked"]["vanilla"]
    assert told["eps"] == 8 / 255 and told["images"] == 3 and told["sparsity"] == pytest.approx(found.sparsity, rel=1e-5)
    assert "Test images before and after PGD-7 at ε = 8/255" in Checked(written.read_text()).text


def test_attack_that_fails_is_told(copied, blank, tmp_path, monkeypatch):
    def fails(*_):
        raise FloatingPointError("the loss holds NaN.")

    monkeypatch.setattr(networks, "attack", fails)
    found = text_of(report([copied], tmp_path / "out", images=4, progress=False))
    assert "there are no pictures of attacked images, since the attack fails (the loss holds NaN). fastsnn report --attacked 0 leaves them out" in found
    assert "Membranes by layer" in found


# ---- what is missing, what is wrong ------------------------------------------------------------------------------------------


def text_of(path) -> str:
    found = Checked(path.read_text()).text
    assert "What is missing" in found
    return found


def test_run_that_has_only_begun(copied, blank, tmp_path):
    for file in copied.iterdir():
        if file.name != "run.json":
            file.unlink()
    found = text_of(report([copied], tmp_path / "out", images=4, attacked=0, progress=False))
    assert f"fastsnn train --resume --out {copied}" in found and "no checkpoint" in found and "the log is empty" in found
    assert f"fastsnn attack {copied} --suite quick --eps 2/255 8/255" in found
    row = json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]
    assert row["clean"] is None and row["attacks"] == [] and row["omega"] is None and row["parameters"]["value"] > 0


def test_without_matplotlib(copied, tmp_path, monkeypatch):
    def missing(module, extra):
        raise ImportError(f"{module} is not installed; install it with: pip install 'fastsnn[{extra}]'")

    monkeypatch.setattr(pictures.base, "need", missing)
    found = text_of(report([copied], tmp_path / "out", images=4, attacked=0, progress=False))
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
    assert text_of(report([copied], tmp_path / "out", images=4, attacked=0, progress=False)).count(wanted) == 1


def test_data_can_lie_elsewhere(source, copied, blank, tmp_path):
    path = load(source).save(tmp_path / "moved.npz")
    data_gone(copied)
    assert "What is missing" not in Checked(report([copied], tmp_path / "out", data=str(path), images=4, attacked=0, progress=False).read_text()).text


def test_warnings_of_attacks_are_shown(copied, blank, tmp_path):
    document = json.loads((copied / "attacks-quick.json").read_text())
    checkpoints.write_json(copied / "attacks-quick.json", document | {"warnings": ["PGD finds less than FGSM"]})
    assert "mpd: PGD finds less than FGSM" in Checked(report([copied], tmp_path / "out", images=4, attacked=0, progress=False).read_text()).text


def test_network_without_spikes(source, blank, tmp_path):
    run = train(Config(**SMALL | {"epochs": 1, "steps": 1}, data=source, neuron="relu", norm="bn", out=str(tmp_path / "ann")), progress=False)
    found = text_of(report([run], tmp_path / "out", images=4, attacked=0, progress=False))
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


def test_wrong_arguments(copied, tmp_path, capsys):
    with pytest.raises(ValueError, match="no run is named"):
        report([], tmp_path)
    with pytest.raises(ValueError, match="images is 0; wanted an int >= 1"):
        report([copied], tmp_path, images=0)
    with pytest.raises(ValueError, match="attacked is -1; wanted an int >= 0"):
        report([copied], tmp_path, attacked=-1)
    with pytest.raises(FileExistsError, match="is a file; wanted a folder"):
        report([copied], copied / "run.json")
    with pytest.raises(SystemExit):
        main(["report", str(copied), "--attacked", "-1"])
    assert "--attacked: '-1'; wanted a whole number" in capsys.readouterr().err
    (copied / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        report([copied], tmp_path / "out", progress=False)


def test_same_folder_twice_and_same_names(runs, tmp_path):
    again = shutil.copytree(runs[0], tmp_path / "again" / runs[0].name)
    assert [run.name for run in folders.read_all([runs[0], runs[0]])] == ["mpd-seed0"]
    assert [run.name for run in folders.read_all([runs[0], again])] == [f"{runs[0].parent.name}/mpd-seed0", "again/mpd-seed0"]


def test_full_disk_leaves_the_report_of_before(copied, blank, tmp_path, monkeypatch):
    path = report([copied], tmp_path / "out", images=4, attacked=0, progress=False)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    assert {file.name: file.read_bytes() for file in report([copied], tmp_path / "out", images=4, attacked=0, progress=False).parent.iterdir()} == before

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "_open", full)
    with pytest.raises(OSError, match="no space left"):
        report([copied], tmp_path / "out", images=8, attacked=0, progress=False)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
