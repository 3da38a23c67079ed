"""One network of `robustness.py`: trained by its recipe, attacked, and looked into; each part goes on where it was stopped."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastsnn import activity, checkpoints, data, evaluation
from fastsnn.attacks import FGSM, PGD, Ensemble, GaussianNoise, UniformNoise, parse_eps
from fastsnn.attacks.base import crafting
from fastsnn.attacks.expectation import is_random
from fastsnn.defenses.base import named_statistics
from fastsnn.defenses.sr import true_share
from fastsnn.evaluation.forward import batches, evaluating
from fastsnn.recipes import Config, by_name, load_recipe
from fastsnn.runs import check_same
from fastsnn.training import train

__all__ = ["Job", "die_with", "read_row", "run"]

#: A membrane is near the threshold within this distance, in units of potential.
NEAR = 0.25
#: An entry of the gradient of the true class's share of probability with respect to the pixels is small below this.
SMALL = 0.01
#: Images on which gradients and spikes are looked at.
LOOKED_AT = 100
#: Images attacked together: small enough that a killed process loses little.
BATCH = 125


@dataclass(frozen=True)
class Job:
    """One network: which recipe and seed, the budget, and how it is attacked. None leaves what the recipe says.

    eps: of the attacks; noise: standard deviation and half width of the noises, in pixels. members: of the ensembles. eot, predictions: for networks that are random at
    inference. train_eps: radius of every defense that has one.
    """

    name: str
    recipe: str
    seed: int
    out: str
    data: str | None = None
    epochs: int | None = None
    train_limit: int | None = None
    batch_size: int | None = None
    train_eps: str | None = None
    device: str = "cpu"
    eps: str = "8/255"
    noise: float = 0.1
    limit: int = 500
    members: str = "extended"
    eot: int = 3
    predictions: int = 3

    @property
    def folder(self) -> Path:
        return Path(self.out) / f"{self.name}-seed{self.seed}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def row(self) -> Path:
        return self.folder / "row.json"

    def config(self) -> Config:
        """The training's settings: the recipe's, within the budget. All training images are trained on, and the last weights count: weights
        chosen by clean accuracy would be those that a defense has changed least."""
        values = load_recipe(self.recipe)
        given = {"data": self.data, "epochs": self.epochs, "train_limit": self.train_limit, "batch_size": self.batch_size}
        values |= {key: value for key, value in given.items() if value is not None}
        values |= {"seed": self.seed, "validation": 0.0, "out": str(self.run), "device": self.device, "checkpoint_every": 100}
        if self.train_eps is not None:
            _set_radius(values, self.train_eps)
        return Config(**values)

    def attacks(self) -> dict:
        """What the results depend on beside the network."""
        return {name: getattr(self, name) for name in ("eps", "noise", "limit", "members", "eot", "predictions")}

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def _set_radius(values: dict, eps: str) -> None:
    from fastsnn.defenses import defense_options

    fields = {item.metadata["defense"]: name for name, item in by_name().items() if item.metadata["defense"]}
    for part in values.get("defense", "vanilla").split("+"):
        if "eps" not in defense_options(part):
            continue
        if (part, "eps") in fields:
            values[fields[part, "eps"]] = eps
        else:
            table = values.setdefault("defense_options", {})
            table.pop(f"{part}.eps", None)
            table[part] = {**table.get(part, {}), "eps": eps}


def die_with(parent: int) -> None:
    """End this process, as a kill would, soon after the one that started it has ended: two must not write to one folder."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def read_row(job: Job) -> dict | None:
    """What `run` found before, where it is what the job asks for; None where there is something to do. A ValueError where the folder
    holds a network of other settings."""
    if (job.run / checkpoints.RUN).exists():
        check_same(checkpoints.read_run(job.run)["config"], job.config(), job.run)
    if not job.row.exists():
        return None
    row = json.loads(job.row.read_text(encoding="utf-8"))
    return row if row["attacks"] == job.attacks() else None


def run(job: Job) -> dict:
    """Train, attack and look into one network, and write what was found; what is there already is not done again."""
    row = read_row(job)
    if row is not None:
        return row
    trained = _train(job)
    began = time.process_time()
    model, record = checkpoints.load_run(job.run, "last", job.device)
    model.eval()
    images = data.load(record["config"]["data"]).limited(test=job.limit)
    x, y = images.x_test, images.y_test
    random = is_random(model)
    found = _attack(job, model, x, y, random)
    torch.manual_seed(0)
    looked = quantities(model, x, y, parse_eps(job.eps))
    row = {
        "name": job.name, "seed": job.seed, "defense": record["config"]["defense"], "options": record["defense"], "random": random, "attacks": job.attacks(),
        "data": record["data"], "config": record["config"], "versions": record["versions"], "test_images": len(y), "training": trained,
        "seconds_of_evaluation": round(time.process_time() - began, 3), **found, "quantities": looked,
    }  # fmt: skip
    checkpoints.write_json(job.row, row)
    (job.folder / "attacks.part").unlink(missing_ok=True)
    return row


def _train(job: Job) -> dict:
    """Train, or go on; {"seconds", "clock", "steps"}. The clock of a CPU is the process's own, which other processes do not move; of a
    stretch that was killed only the steps are known, and they count at the price of the others."""
    config, pieces = job.config(), job.folder / "seconds.json"
    job.folder.mkdir(parents=True, exist_ok=True)
    last = job.run / checkpoints.LAST
    done = checkpoints.load(last)[1]["step"] if last.exists() else 0
    data.load(config.data)  # both import what the clock shall not see
    torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    began = time.process_time()
    train(config, resume=(job.run / checkpoints.RUN).exists(), progress=False)
    spent = time.process_time() - began
    record = checkpoints.read_run(job.run)
    known = json.loads(pieces.read_text())["pieces"] if pieces.exists() else []
    if record["steps"] > done:
        known.append([record["steps"] - done, spent])
        checkpoints.write_json(pieces, {"pieces": known})
    if not job.device.startswith("cpu"):
        return {"seconds": record["seconds"], "clock": "wall", "steps": record["steps"]}
    steps = sum(count for count, _ in known)
    seconds = sum(seconds for _, seconds in known) * record["steps"] / steps if steps else None
    return {"seconds": seconds, "clock": "CPU", "steps": record["steps"]}


def _attack(job: Job, model: nn.Module, x: Tensor, y: Tensor, random: bool) -> dict:
    """The attacks of the suite `ensemble` at one size, and noise, sample by sample."""
    eot, predictions = (job.eot, job.predictions) if random else (1, 1)
    shared, many = {"seed": 0, "eot": eot}, {"members": job.members}
    attacks = {"fgsm": FGSM(job.eps, **shared), "pgd7": PGD(job.eps, steps=7, **shared), "ensemble-fgsm": Ensemble(job.eps, base="fgsm", **many, **shared)}
    attacks |= {"ensemble-pgd7": Ensemble(job.eps, base="pgd", steps=7, **many, **shared)}
    attacks |= {"uniform": UniformNoise(job.noise, seed=0), "gaussian": GaussianNoise(job.noise, seed=0)}
    part = job.folder / "attacks.part"

    def evaluate() -> evaluation.Evaluation:
        torch.manual_seed(0)
        return evaluation.evaluate(model, x, y, attacks, BATCH, job.device, resume=part, skips=["ensemble-pgd7"], predictions=predictions)

    try:
        result = evaluate()
    except evaluation.ResumeError:  # left by a call with other attacks
        part.unlink()
        result = evaluate()
    rows = result.results | {"worst": result.worst_cases()[f"linf {evaluation.size_text(parse_eps(job.eps))}"]}
    correct = {name: evaluation.results.flags_text(row.correct) for name, row in rows.items()}
    warnings = [text for text in result.warnings if not (random and "outputs are random" in text)]  # which the table says anyway
    return {"eot": eot, "predictions": predictions, "correct": correct, "warnings": warnings, "zero_gradient": rows["pgd7"].zero_gradient}


def quantities(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float | None]:
    """What defenses are about, on clean images but for "shift"; None where a network has no such thing.

    omega, guard (share of membranes within NEAR of the threshold), rate: means over spiking layers. singular: mean distance of the
    singular values of all weights from 1. sparsity: share of the entries of dp/dx below SMALL, p the true class's probability against the best
    wrong class; gradient: the mean l1 norm of dp/dx. shift: how far PGD-7 moves the spikes of the last spiking layer, relative to their own norm.
    """
    found: dict[str, float | None] = {}
    spiking = activity.spiking_layers(model)
    layers = evaluation.diagnose(model, x, batch_size=BATCH) if spiking else []
    for key in ("omega", "rate"):
        found[key] = sum(getattr(layer, key) for layer in layers) / len(layers) if layers else None
    found["guard"] = near_threshold(model, x) if spiking else None
    values = torch.cat([value.detach().flatten().double() for value in activity.singular_values(model).values()])
    found["singular"] = (values - 1).abs().mean().item()
    few, labels = next(batches(model, x[:LOOKED_AT], y[:LOOKED_AT], LOOKED_AT, None))
    gradient = input_gradient(model, few, labels)
    found["sparsity"] = (gradient.abs() < SMALL).double().mean().item()
    found["gradient"] = gradient.abs().flatten(1).sum(1).mean().item()
    found["shift"] = None
    if spiking:
        try:
            found["shift"] = activity.spike_distance(model, few, PGD(eps, steps=7, seed=0)(model, few, labels))[-1].relative
        except ValueError:  # layers that cannot be told apart
            pass
    return found


def near_threshold(model: nn.Module, x: Tensor) -> float:
    """The share of membranes within NEAR of the threshold, the mean over spiking layers."""
    total, count = 0.0, 0
    with evaluating(model):
        for images, _ in batches(model, x, None, BATCH, None):
            _, entries = named_statistics(model, images, ("guard",), (NEAR, 0))
            total += len(images) * sum(entry.guard.double().mean().item() for _, entry in entries) / len(entries)
            count += len(images)
    return total / count


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """[N, C, H, W]: the gradient of the true class's probability against the best wrong class, through the surrogate of training."""
    with crafting(model), torch.enable_grad():
        leaf = images.detach().requires_grad_()
        return torch.autograd.grad(true_share(model(leaf), labels).sum(), leaf)[0].double()
