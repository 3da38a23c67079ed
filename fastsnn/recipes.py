"""Settings of a training run: one dataclass, from which command-line options, recipe files and their documentation come.

A recipe is a TOML file whose keys are the fields of `Config`; `about`, one line of text, is shown by `fastsnn recipes`.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path

from .adjoints import nearest

__all__ = ["Config", "canonical", "describe", "inherited", "load_recipe", "names", "option_table", "parse_fraction"]

_PACKAGE = Path(__file__).resolve().parent
#: Where recipes lie: in an installed package, or beside it in a checkout.
FOLDERS = (_PACKAGE / "recipe_files", _PACKAGE.parent / "recipes")


#: Titles of groups of settings, by the first field of each.
GROUPS = {"model": "network", "data": "data", "defense": "defense", "optimizer": "training", "device": "machine", "out": "run folder"}


def _table(module: str, name: str) -> Callable[[], tuple[str, ...]]:
    """The names in a table of another module, which is imported when they are asked for."""
    return lambda: tuple(getattr(importlib.import_module(f"fastsnn.{module}"), name))


def _words(*choices: str) -> Callable[[], tuple[str, ...]]:
    return lambda: choices


def setting(default, help: str, *, choices=None, low=None, above=None, high=None, below=None, resume=False, defense=None, fraction=False) -> Field:
    """One field of `Config`. low <= value, above < value, value <= high, value < below.

    resume: whether a resumed run may change it. defense: (name, option) that it is passed on to. fraction: takes "2/255".
    """
    metadata = dict(help=help, choices=choices, low=low, above=above, high=high, below=below, resume=resume, defense=defense, fraction=fraction)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_fraction(text: object) -> float:
    """`"8/255"` or a number, as a float."""
    try:
        if isinstance(text, bool):
            raise ValueError
        over, _, under = str(text).partition("/")
        return float(over) / (float(under) if under else 1.0)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r}; wanted a number or a fraction such as 8/255") from None


#: Where neither settings nor defense say another (SNN-RAT).
WEIGHT_DECAY = 5e-4


def _weight_decay(settings: Mapping) -> float:
    defenses = importlib.import_module("fastsnn.defenses").DEFENSES
    own = (getattr(defenses.get(name), "weight_decay", None) for name in settings["defense"].split("+"))
    return next((value for value in own if value is not None), WEIGHT_DECAY)


def _of_at(settings: Mapping, option: str, read: Callable) -> float:
    """An option of adversarial training, from whichever of the two places it is set in."""
    return read(settings.get("defense_options", {}).get(f"at.{option}", settings[f"at_{option}"]))


#: What `auto` stands for, by setting: settings -> number.
AUTO: dict[str, Callable[[Mapping], float]] = {
    "at_step_size": lambda settings: _of_at(settings, "eps", parse_fraction) / _of_at(settings, "steps", int),
    "beta": lambda settings: 0.004 if settings["model"].startswith("wrn") else 0.001,
    "weight_decay": _weight_decay,
}


@dataclass(frozen=True)
class Config:
    """Every setting of a training run, checked when it is made: an unknown name is answered with the nearest.

    >>> Config(model="small_cnn", data="digits", epochs=5, defense="mpd-sgr+at", eta=0.1).batch_size
    64
    """

    model: str = setting("vgg11", "network", choices=_table("models", "MODELS"))
    model_options: dict = setting({}, "further options of the network, for example dropout=0.2")
    steps: int = setting(4, "time steps T", low=1)
    neuron: str = setting("if", "neuron; relu gives the network without spikes", choices=_table("models", "NEURONS"))
    neuron_options: dict = setting({}, "options of the neuron, for example decay=0.9 threshold=1.0")
    surrogate: str = setting("auto", "surrogate gradient and its parameters, for example triangle:1.0 or atan:2.0; auto: the neuron's own")
    norm: str = setting("tdbn", "normalisation of channels", choices=_table("norm", "NORMS"))
    norm_options: dict = setting({}, "options of the normalisation")
    encoding: str = setting("direct", "how images become currents or spikes", choices=_table("encodings", "ENCODINGS"))
    encoding_options: dict = setting({}, "options of the encoding")
    readout: str = setting("mean", "logits from the outputs of the steps", choices=_words("mean", "sum", "membrane"))
    normalise: str = setting("auto", "whose mean and deviation normalise the images; auto: the data's own", choices=lambda: ("auto", *_table("models", "NORMALISATIONS")()))
    init: str = setting(
        "", "run folder whose weights training starts from, a converted one for example; its network and data are taken too, where options and recipe name no others"
    )

    data: str = setting("digits", "data: digits, the path of an .npz file or of an official archive or folder, or FORMAT:PATH", resume=True)
    validation: float = setting(0.1, "share of the training images kept for choosing the best weights; 0: the last weights are the result", low=0.0, below=1.0)
    train_limit: int = setting(0, "use so many training images only; 0: all", low=0)
    crop: int = setting(0, "random crops after padding by so many pixels; 0: none", low=0)
    flip: bool = setting(False, "flip half of the images left to right")
    cutout: int = setting(0, "side of the square that is blanked, in pixels; 0: none", low=0)

    defense: str = setting("vanilla", "defense, or several joined by +, for example mpd-sgr+at", choices=_table("defenses", "DEFENSES"))
    eta: float = setting(0.05, "weight of Omega", low=0.0, defense=("mpd-sgr", "eta"))
    gamma: float = setting(1.0, "half width of Omega's window around the threshold, in units of potential", above=0.0, defense=("mpd-sgr", "gamma"))
    average: str = setting(
        "layers", "Omega's mean: over the means of layers, or flat over channels", choices=_words("layers", "flat"), defense=("mpd-sgr", "average")
    )
    at_eps: str = setting("2/255", "radius of the attack in training, pixels in [0, 1]", low=0.0, high=1.0, fraction=True, defense=("at", "eps"))
    at_steps: int = setting(2, "steps of the attack in training", low=1, defense=("at", "steps"))
    at_step_size: str = setting("auto", "step size of the attack in training; auto: at_eps/at_steps", above=0.0, high=1.0, fraction=True, defense=("at", "step_size"))
    beta: str = setting("auto", "strength of the orthogonal pull on weights; auto: 0.004 for wide residual networks, else 0.001", low=0.0, fraction=True, defense=("reg", "beta"))

    defense_options: dict = setting({}, "options of defenses, DEFENSE.OPTION=VALUE, for example trades.weight=6 trades.eps=4/255; `fastsnn defenses` lists them")

    optimizer: str = setting("sgd", "optimiser", choices=_words("sgd", "adamw"))
    lr: float = setting(0.1, "learning rate", above=0.0)
    momentum: float = setting(0.9, "momentum of sgd", low=0.0, below=1.0)
    weight_decay: str = setting("auto", "weight decay; auto: the defense's own, else 0.0005", low=0.0, fraction=True)
    schedule: str = setting("cosine", "learning rate over the epochs", choices=_words("cosine", "constant"))
    warmup: int = setting(0, "epochs in which the learning rate rises from 0", low=0)
    epochs: int = setting(200, "epochs", low=1)
    batch_size: int = setting(64, "images in a batch, over all processes together", low=1)
    smoothing: float = setting(0.0, "label smoothing", low=0.0, below=1.0)
    seed: int = setting(0, "seed of everything random", low=0)

    device: str = setting("auto", "device: cpu, cuda, cuda:1 ...; auto: a GPU where there is one", resume=True)
    precision: str = setting(
        "float32",
        "arithmetic; tf32: float32 whose products a GPU rounds to 10 bits; bfloat16: autocast, for GPUs and the few CPUs that have it, weights stay float32",
        choices=_words("float32", "tf32", "bfloat16", "float64"),
    )
    channels_last: bool = setting(False, "images and convolutions in channels-last memory format")
    compile: bool = setting(False, "torch.compile the network")
    cuda_graphs: bool = setting(False, "capture forward and backward pass as one CUDA graph (GPU only)")
    deterministic: bool = setting(False, "on a GPU, only algorithms that repeat bit for bit, slower; a CPU repeats in any case")

    out: str = setting("", "folder of the run; default: runs/DEFENSE-MODEL-DATA-seedSEED", resume=True)
    checkpoint_every: int = setting(0, "steps between checkpoints; 0: one at the end of each epoch", low=0, resume=True)
    validate_every: int = setting(1, "epochs between validations; the last epoch is always validated", low=1)
    log_every: int = setting(20, "steps between readings of loss and accuracy; a reading waits for the device", low=1, resume=True)
    max_steps: int = setting(0, "stop after so many steps in all; 0: after the last epoch", low=0, resume=True)
    tensorboard: bool = setting(False, "write for TensorBoard too (extra: tensorboard)", resume=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            try:
                object.__setattr__(self, item.name, convert(item, getattr(self, item.name)))
            except ValueError as error:
                raise ValueError(f"Config: {item.name} is {error}") from None
        if self.warmup >= self.epochs:
            raise ValueError(f"Config: warmup is {self.warmup} of {self.epochs} epochs; wanted fewer. Give more --epochs, or less --warmup.")
        used = self.defense.split("+")
        self._check_defense_options(used)
        for item in fields(self):
            owner = item.metadata["defense"]
            if owner and owner[0] not in used and getattr(self, item.name) != item.default and not self._stands_for_auto(item.name):
                raise ValueError(f"Config: {item.name} = {getattr(self, item.name)} is a setting of defense {owner[0]}; the defense is {self.defense}. Drop one of them.")

    def _check_defense_options(self, used: list[str]) -> None:
        flat = {}
        for key, value in self.defense_options.items():  # tables of a recipe, [defense_options.trades], become trades.weight
            flat |= {f"{key}.{option}": entry for option, entry in value.items()} if isinstance(value, dict) else {key: value}
        object.__setattr__(self, "defense_options", flat)
        own = {f"{owner[0]}.{owner[1]}": item for item in fields(self) if (owner := item.metadata["defense"])}
        for key in flat:
            name, dot, option = key.partition(".")
            if not dot or not option:
                raise ValueError(f"Config: defense_options has {key!r}; wanted DEFENSE.OPTION, for example {used[0]}.{key}.")
            if name not in used:
                raise ValueError(f"Config: defense_options has {key!r}; the defense is {self.defense}. Drop the option, or add {name} to the defense.")
            if key in own and getattr(self, own[key].name) != default_of(own[key]):
                raise ValueError(f"Config: {key} is given twice, as {own[key].name} and in defense_options; wanted it once.")
        defenses = importlib.import_module("fastsnn.defenses")
        try:
            made = defenses.make_defense(self.defense, self.of_defenses())
        except (TypeError, ValueError) as error:
            raise ValueError(f"Config: {error}") from None
        if self.cuda_graphs and type(made).updates is not defenses.Defense.updates:
            raise ValueError(f"Config: cuda_graphs captures one update a batch, and {self.defense} makes several; wanted it off. Leave --cuda-graphs out.")

    def number(self, name: str) -> float:
        """A setting as a number, `auto` as what it stands for.

        >>> Config(model="wrn16_4", defense="reg").number("beta")
        0.004
        """
        value = getattr(self, name)
        return AUTO[name](vars(self)) if value == "auto" else parse_fraction(value)

    def _stands_for_auto(self, name: str) -> bool:
        return name in AUTO and self.number(name) == AUTO[name](vars(self))

    def of_defenses(self) -> dict[str, dict]:
        """Options of each defense that is used, as `make_defense` takes them."""
        options: dict[str, dict] = {name: {} for name in self.defense.split("+")}
        for item in fields(self):
            owner = item.metadata["defense"]
            if owner and owner[0] in options:
                value = getattr(self, item.name)
                options[owner[0]][owner[1]] = self.number(item.name) if item.metadata["fraction"] else value
        for key, value in self.defense_options.items():
            name, _, option = key.partition(".")
            options[name][option] = value
        return {name: values for name, values in options.items() if values}

    def folder(self) -> Path:
        """Where the run lies: `out`, or a name made of defense, model, data and seed."""
        if self.out:
            return Path(self.out)
        data = re.sub(r"(\.tar)?\.[a-z]+$", "", Path(self.data.rpartition(":")[2]).name)
        return Path("runs") / f"{self.defense}-{self.model}-{data}-seed{self.seed}"

    def to_dict(self) -> dict:
        return asdict(self)


def inherited(folder: str | Path) -> dict:
    """The settings of a run that a training which starts from its weights goes on with: those of the network and of the data.

    Errors as in `checkpoints.read_run`.

    >>> Config(**{**inherited("runs/snn"), "init": "runs/snn", "defense": "robust-tuning", "lr": 0.001})
    """
    saved = importlib.import_module("fastsnn.checkpoints").read_run(folder)["config"]
    order = [item.name for item in fields(Config)]
    return {name: saved[name] for name in order[: order.index("defense")] if name in saved and name != "init"}


def by_name() -> dict[str, Field]:
    """The fields of `Config` by name."""
    return {item.name: item for item in fields(Config)}


def canonical(settings: Mapping) -> dict:
    """Settings in the words that runs of equal settings share: `auto` where a number is what it stands for, or is not used.

    settings: a dict of names and values, of `Config.to_dict` or of a run folder, of which some may be missing.

    >>> canonical({"defense": "reg", "model": "vgg11", "beta": 0.001})["beta"]
    'auto'
    """
    found, known = dict(settings), by_name()
    used = str(found.get("defense", "")).split("+")
    for name, meaning in AUTO.items():
        owner = known[name].metadata["defense"]
        if found.get(name, "auto") == "auto":
            continue
        try:
            unused = owner is not None and owner[0] not in used
            found[name] = "auto" if unused or parse_fraction(found[name]) == meaning(settings) else str(found[name])
        except (AttributeError, KeyError, TypeError, ValueError):  # what is wrong with it is said where it is used
            continue
    return found


def default_of(item: Field) -> object:
    return item.default if item.default is not MISSING else item.default_factory()


def convert(item: Field, value: object) -> object:
    """A value for a field, in the field's type and within its bounds; else a ValueError `VALUE; wanted ...`."""
    about, kind = item.metadata, item.type
    if kind == "dict":
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{value!r}; wanted a table of options, NAME = VALUE")
        try:  # as the run folder will hold it: a resumed run compares with that
            return json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            raise ValueError(f"{value!r}; wanted options that JSON can hold: finite numbers, words, true, false, and lists and tables of them") from None
    if kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{value!r}; wanted true or false")
        return value
    if about["fraction"]:
        if value == default_of(item) == "auto":
            return value
        _bounded(parse_fraction(value), about)
        return str(value)
    if kind in ("int", "float"):
        number = _number(kind, value)
        _bounded(number, about)
        return number
    if not isinstance(value, str):
        raise ValueError(f"{value!r}; wanted text")
    if about["choices"]:
        known = about["choices"]()
        for part in value.split("+") if item.name == "defense" else [value]:
            if part not in known:
                raise ValueError(f"{part!r}, which is unknown; wanted one of {', '.join(known)}.{nearest(part, known)}")
    return value


def _number(kind: str, value: object) -> int | float:
    try:
        if isinstance(value, bool):
            raise ValueError
        if kind == "int":
            if isinstance(value, float) and value != int(value):
                raise ValueError
            return int(value)
        number = float(value)
        if not math.isfinite(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r}; wanted {'a whole number' if kind == 'int' else 'a number'}") from None


def _bounded(number: float, about) -> None:
    low, above, high, below = (about[name] for name in ("low", "above", "high", "below"))
    if (low is not None and number < low) or (above is not None and number <= above) or (high is not None and number > high) or (below is not None and number >= below):
        limits = [f"{sign} {limit:g}" for sign, limit in ((">=", low), (">", above), ("<=", high), ("<", below)) if limit is not None]
        raise ValueError(f"{number!r}; wanted a value {' and '.join(limits)}")


def names() -> dict[str, Path]:
    """The recipes that come with fastsnn: path by name."""
    return {path.stem: path for folder in FOLDERS if folder.is_dir() for path in sorted(folder.glob("*.toml"))}


def find(recipe: str | Path) -> Path:
    """The file of a recipe, given by its path or by its name."""
    if Path(recipe).is_file():
        return Path(recipe)
    known = names()
    name = Path(recipe).name.removesuffix(".toml") if Path(recipe).parent in (Path(), Path("recipes")) else ""
    if name in known:
        return known[name]
    raise FileNotFoundError(f"recipe {str(recipe)!r} is neither a file nor the name of a recipe; `fastsnn recipes` lists the names.{nearest(str(recipe), tuple(known))}")


def load_recipe(recipe: str | Path) -> dict:
    """The settings in a recipe file, each checked; an error names the file, the line, and the nearest valid word.

    recipe: the name of a recipe that comes with fastsnn, or the path of a TOML file.
    """
    path = find(recipe)
    text = path.read_text(encoding="utf-8")
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    found.pop("about", None)
    known, values = by_name(), {}
    for key, value in found.items():
        where = f"{path}{_line(text, key)}"
        if key not in known:
            raise ValueError(f"{where}: key {key!r} is unknown.{nearest(key, tuple(known))} `fastsnn train --help` lists the keys (as options).")
        try:
            values[key] = convert(known[key], value)
        except ValueError as error:
            raise ValueError(f"{where}: {key} is {error}") from None
    try:
        Config(**values)  # settings that do not go together
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix('Config: ')}") from None
    return values


def _line(text: str, key: str) -> str:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*\[?\s*\"?{re.escape(key)}\"?\s*[=\].]", line):
            return f", line {number}"
    return ""


def about(recipe: str | Path) -> str:
    """The line of a recipe that says what it is."""
    return tomllib.loads(find(recipe).read_text(encoding="utf-8")).get("about", "")


def option(name: str) -> str:
    """A field's name as a command-line option."""
    return "--" + name.replace("_", "-")


def describe(item: Field) -> str:
    """A field's help, with the valid names and the default."""
    default = default_of(item)
    shown = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
    words = item.metadata["help"]
    if item.metadata["choices"]:
        words += f" [{', '.join(item.metadata['choices']())}]"
    if default not in ("", {}):
        words += f" (default: {shown})"
    return words


def option_table() -> str:
    """Every setting as a Markdown table, for the documentation."""
    rows = ["| key | option | meaning | resumed runs may change it |", "| --- | --- | --- | --- |"]
    for item in fields(Config):
        rows.append(f"| `{item.name}` | `{option(item.name)}` | {describe(item)} | {'yes' if item.metadata['resume'] else ''} |")
    return "\n".join(rows)
