"""Where a training starts from, other than weights drawn at random: the weights of another run, such as a converted network's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from . import checkpoints
from .neurons import Neuron
from .recipes import Config

__all__ = ["Start", "read_start"]


@dataclass(frozen=True)
class Start:
    """The weights of a run, and what its run.json says of them.

    weights: file and fingerprint. spec: of the run's network. tensors: its state_dict; None where a resumed run has weights of its own.
    """

    folder: Path
    weights: dict
    spec: dict
    tensors: dict[str, Tensor] | None = None

    @property
    def normalise(self) -> object:
        """As `models.build` takes it: the weights were made for images normalised so."""
        return self.spec["normalise"]

    def load_into(self, model: nn.Module) -> None:
        """Put the weights into a network of the same parameters; a ValueError names the first that it lacks or has in another shape."""
        if self.tensors is None:
            return
        wanted, name = model.state_dict(), self.spec["name"]
        cure = "Leave the settings of the network out, they are those of the run then"
        if self.spec["neuron"] == "relu" and any(isinstance(layer, Neuron) for layer in model.modules()):
            raise ValueError(
                f"train: init is {self.folder}, an ANN, and the network of these settings is spiking: its thresholds would not fit the weights. "
                f"Convert it: fastsnn convert {self.folder} --out ANOTHER, and start from that."
            )
        for key in (*wanted, *self.tensors):
            there, here = (tuple(state[key].shape) if key in state else None for state in (self.tensors, wanted))
            if there == here:
                continue
            words = [f"has {key} {list(shape)}" if shape is not None else f"has no {key}" for shape in (there, here)]
            raise ValueError(f"train: init is {self.folder}, whose {name} {words[0]}; the network of these settings {words[1]}. {cure}.")
        model.load_state_dict(self.tensors)

    def changes(self, model: nn.Module) -> str:
        """In which options the network differs from the run's, as the end of a sentence."""
        spec = model.spec or {}
        differ = [f"{key} {value!r} to {spec[key]!r}" for key, value in self.spec.items() if key in spec and spec[key] != value]
        return f", with changes: {', '.join(differ)}" if differ else ""

    def to_dict(self) -> dict:
        """As run.json holds it."""
        return {"run": str(self.folder), "weights": self.weights, "model": self.spec}


def read_start(config: Config, saved: dict | None = None) -> Start:
    """The start that the setting `init` names: the best weights of that run, the last where it was trained without validation.

    saved: run.json of a run that is resumed. It reads the weights again only while it has no checkpoint of its own. Raises
    FileNotFoundError where they are gone, ValueError where they have become others.
    """
    folder = Path(config.init)
    before = None if saved is None else saved.get("init")
    if saved is not None and before is None:
        raise ValueError(f"train: init is {folder}, but the run that is resumed started from weights of its own seed. Leave --init out, or start a new run with another --out.")
    if before is not None and (config.folder() / checkpoints.LAST).exists():
        return Start(folder, before["weights"], before["model"])
    run = checkpoints.read_run(folder)
    path = folder / (checkpoints.BEST if run["config"]["validation"] > 0 else checkpoints.LAST)
    if not path.is_file():
        raise FileNotFoundError(f"train: init is {folder}, which holds no {path.name} yet; wanted a run with weights. Finish it: fastsnn train --resume --out {folder}.")
    weights = {"file": path.name, "fingerprint": checkpoints.fingerprint(path)}
    if before is not None and before["weights"]["fingerprint"] != weights["fingerprint"]:
        raise ValueError(
            f"train: {path} holds other weights than the run started from (fingerprint {weights['fingerprint']}, wanted {before['weights']['fingerprint']}). "
            "Start a new run with another --out."
        )
    return Start(folder, weights, run["model"], checkpoints.part(checkpoints.load(path)[0], checkpoints.MODEL))
