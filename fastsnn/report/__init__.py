"""`fastsnn report`: run folders as one page of tables and pictures, in HTML and Markdown.

>>> page = fastsnn.report.report([Path("runs/vanilla"), Path("runs/mpd")], Path("report"))
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .. import __version__, checkpoints
from ..pictures import Layer
from . import folders, page, table
from .draw import Studio
from .folders import Run
from .networks import Looked, look
from .table import text_table

__all__ = ["report", "text_table"]


def report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    data: str | None = None,
    device: str | torch.device = "cpu",
    images: int = 512,
    attacked: int = 8,
    progress: bool = True,
) -> Path:
    """Write the report of run folders, and return the path of its HTML page.

    runs: folders that `fastsnn train` wrote; those that differ in nothing but the seed share a row of the table. Omega of
    all of them is that of one window, the first one's that was trained with mpd-sgr, else 1.
    out: the folder for report.html (everything inside), report.md, table.json and the pictures as PNG; files of an earlier
    report are replaced, each at once. data: where the test images are, as in `fastsnn train --data`; None: where each run
    found them. device: where networks run; `auto`: a GPU where there is one. images: at most so many test images for the
    membranes, each class with its share. attacked: at most so many that are attacked anew, for pictures of images, of the loss
    around them and around the weights, and of what their layers do; 0: none. progress: say on stderr what is done.

    What a run lacks, or what cannot be read, is named on the page with the command that makes it. Raises
    FileNotFoundError for a folder that is no run, ValueError for a run.json that cannot be read, images < 1 or attacked < 0.

    >>> report(["runs/vanilla", "runs/mpd"], "report")
    """
    if isinstance(runs, (str, os.PathLike)):
        runs = [runs]
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"report: images is {images!r}; wanted an int >= 1.")
    if isinstance(attacked, bool) or not isinstance(attacked, int) or attacked < 0:
        raise ValueError(f"report: attacked is {attacked!r}; wanted an int >= 0.")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"report: {out} is a file; wanted a folder, new or old. Choose another with --out.")
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    say: Callable[[str], None] = (lambda text: print(f"report: {text}", file=sys.stderr, flush=True)) if progress else (lambda text: None)
    loaded = folders.read_all([Path(run) for run in runs])
    sets: dict[str, object] = {}
    seen: list[tuple[Run, Looked]] = []
    gamma = next((run.gamma for run in loaded if "mpd-sgr" in run.defense.split("+")), 1.0)
    eps = max((result.eps for run in loaded for result in run.results if "(" not in result.attack), default=0.0) or 8 / 255
    for run in loaded:
        say(f"{run.name}: membranes{' and attacked images' if attacked else ''}")
        looked, notes = look(run, data, device, images, attacked, eps, sets, gamma)
        layers = looked.layers
        found = {"omega": _mean([layer.omega for layer in layers]), "rate": _mean([layer.rate for layer in layers])} if layers else {}
        if not layers and run.gamma != gamma and run.omega is not None:
            found = {"omega": None}
            notes.append(f"{run.name}: the Ω of its log is of the window ±{run.gamma:g}, not ±{gamma:g} as in the table, and is left out.")
        seen.append((dataclasses.replace(run, missing=(*run.missing, *notes), measured=found), looked))
    groups = table.group_runs([run for run, _ in seen])
    out.mkdir(parents=True, exist_ok=True)
    say("pictures")
    studio = Studio()
    sections = _sections(seen, groups, studio, gamma)
    for file, content in studio.files.items():
        checkpoints.write(out / file, content)
    count = f"{len(seen)} run{'s' * (len(seen) > 1)}"
    title, lead = f"fastsnn: {seen[0][0].name}" if len(seen) == 1 else f"fastsnn: {count} compared", _lead(count, [run for run, _ in seen])
    rows = {
        "fastsnn": __version__,
        "rows": table.rows_of(groups, gamma),
        "layers": {run.name: [_layer_row(layer) for layer in looked.layers] for run, looked in seen},
        "attacked": {run.name: looked.attacked.to_dict() for run, looked in seen if looked.attacked},
    }
    checkpoints.write(out / "table.json", (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode())
    checkpoints.write(out / "report.md", page.to_markdown(title, lead, sections).encode())
    checkpoints.write(out / "report.html", page.to_html(title, lead, sections).encode())
    say(f"{out / 'report.html'}")
    return out / "report.html"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _lead(count: str, runs: Sequence[Run]) -> str:
    totals = sorted({result.total for run in runs for result in run.results if result.total})
    attacked = f" Accuracies are over {' or '.join(f'{total:,}' for total in totals)} test images." if totals else ""
    return f"{count}, read by fastsnn {__version__}.{attacked}"


def _sections(seen: Sequence[tuple[Run, Looked]], groups: Sequence[table.Group], studio: Studio, gamma: float) -> list[page.Section]:
    runs = [run for run, _ in seen]
    compared: list[page.Block] = [table.table(groups, gamma)]
    if any(result.attack != "clean" for run in runs for result in run.results):
        compared += studio.against_eps(groups) + studio.against_steps(groups) + studio.members(groups)
    warnings = table.differences(groups) + [text for run in runs for text in run.warnings]
    sections = [page.Section("Results", compared)]
    if (checks := table.check_table(runs)) is not None:
        sections.append(page.Section("Checks", [checks]))
    if warnings:
        sections.append(page.Section("What makes figures doubtful", [page.Items(warnings)]))
    for run, looked in seen:
        blocks: list[page.Block] = [page.Facts(_facts(run))]
        blocks += studio.learning(run) + studio.over_training(run)
        if looked.layers:
            blocks += studio.membranes(run, looked.layers)
            blocks.append(_layer_table(looked.layers))
        if looked.attacked:
            blocks += studio.examples(run, looked.attacked) + studio.landscapes(run, looked.attacked) + studio.under_attack(run, looked.attacked)
        if (attacks := table.attack_table(run)) is not None:
            blocks.append(attacks)
        blocks += [block for block in (table.corruption_table(run), table.activity_table(run)) if block is not None]
        if run.checks:
            blocks += [page.Text("What the checks found:"), page.Items([f"{check.suite}, {check.name}: {check.verdict}; {check.text}" for check in run.checks])]
        sections.append(page.Section(run.name, blocks))
    missing = [text for run in runs for text in run.missing] + studio.missing
    if missing:
        sections.insert(1, page.Section("What is missing", [page.Items(missing)]))
    return sections


def _facts(run: Run) -> list[tuple[str, str]]:
    config, versions = run.config, run.document.get("versions", {})
    shown = ("model", "data", "defense", "steps", "neuron", "norm", "encoding", "optimizer", "lr", "batch_size", "epochs", "precision", "seed")
    facts = [(name, config.get(name)) for name in shown]
    facts = [("T" if name == "steps" else name.replace("_", " "), str(value)) for name, value in facts if value not in (None, "")]
    if run.document.get("defense"):
        facts = [(name, str(run.document["defense"]) if name == "defense" else value) for name, value in facts]
    facts += [("parameters", f"{run.parameters:,}")] if run.parameters else []
    facts += [("neurons", f"{run.document['neurons']:,}")] if run.document.get("neurons") else []
    facts += [("made with", ", ".join(f"{name} {version}" for name, version in versions.items()))] if versions else []
    return facts


def _layer_row(layer: Layer) -> dict:
    row = {name: getattr(layer, name) for name in ("name", "omega", "inside", "mean", "deviation", "rate", "gamma")}
    return row | {"half_width": layer.half_width if layer.half_width != float("inf") else None}


def _layer_table(layers: Sequence[Layer]) -> page.Table:
    columns = [page.Column(name) for name in ("layer", "Ω", "share inside", "mean", "deviation", "firing rate", "half-width")]
    rows = []
    for layer in layers:
        values = [f"{layer.omega:.3f}", f"{layer.inside:.3f}", f"{layer.mean:.3f}", f"{layer.deviation:.3f}", f"{layer.rate:.3f}", f"{layer.half_width:.3g}"]
        rows.append([page.Cell(layer.name), *(page.Cell(value.replace("-", "−").replace("inf", "∞")) for value in values)])
    caption = (
        f"Membranes by layer. Ω is the share within ±{layers[0].gamma:g} of the threshold that a Gaussian for each step and channel gives, share inside the one "
        "that was counted; mean and deviation of z, over all channels and steps together, and the half-width of the surrogate's window, are in units of potential."
    )
    return page.Table(caption, columns, rows)
