"""`fastsnn convert`: the run of an ANN to the run of a spiking network, which `fastsnn train --init` goes on from."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import Parser, guarded, positive

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import Network

__all__ = ["add", "config_of"]

DESCRIPTION = (
    "Convert the ANN of a run (`fastsnn train --ann`) to a spiking network: weights kept, thresholds balanced layer by layer on training images. Writes a run folder "
    "with pictures in it (accuracy and the error of rates against T, spikes), and prints thresholds, memory, time, accuracy before and after, and what neurons spend. "
    "Fine-tune it: fastsnn train --recipe cpu-convert-tune --init OUT."
)
#: kappa of robust conversion where it is not that of `conversion.convert`, by data.
SMALL_KAPPA = {"cifar100": 0.1, "tiny": 0.1}


def add(commands) -> Parser:
    parser = commands.add_parser("convert", help="convert a trained ANN to a spiking network", description=DESCRIPTION)
    parser.fill = fill
    return parser


def fill(parser: Parser) -> None:
    from ..conversion import METHODS

    parser.add_argument("folder", metavar="RUN", help="the folder of an ANN that `fastsnn train --ann` made")
    parser.add_argument("--out", metavar="DIR", help="folder of the spiking network's run (default: RUN-snn)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="time steps T (default: 8)")
    text = "robust: thresholds and norms to be fine-tuned at a small T; plain: no fine-tuning, for a large T (default: robust)"
    parser.add_argument("--method", choices=tuple(METHODS), default="robust", help=text)
    neurons = parser.add_argument_group("neurons")
    neurons.add_argument("--decay", type=float, metavar="X", help="leak factor of a step, which makes them LIF (default: none, IF)")
    neurons.add_argument("--reset", choices=("hard", "soft"), help="reset (default: hard; soft with --method plain)")
    neurons.add_argument("--surrogate", metavar="TEXT", help="surrogate gradient of fine-tuning, for example atan:2.0 (default: triangle:1.0)")
    balancing = parser.add_argument_group("threshold balancing")
    balancing.add_argument("--rho", type=float, metavar="X", help="share of a layer's inputs that its value is at least (default: 0.997; 1, the maximum, with --method plain)")
    text = "threshold as a share of that value (default: 0.1 for CIFAR-100 and Tiny-ImageNet, else 0.3; 1 with --method plain)"
    balancing.add_argument("--kappa", type=float, metavar="X", help=text)
    balancing.add_argument("--calibration-steps", type=positive, default=100, metavar="N", help="steps T_c of the calibration; plain conversion has none (default: 100)")
    balancing.add_argument("--batches", type=positive, default=10, metavar="N", help="mini-batches of training images (default: 10)")
    balancing.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images in a mini-batch (default: 64)")
    text = (
        "running statistics of norms: calibrate, their means over the mini-batches, so that there is an accuracy before fine-tuning; restart, 0 and 1, as in the paper "
        "(default: calibrate)"
    )
    balancing.add_argument("--running", choices=("calibrate", "restart"), default="calibrate", help=text)
    balancing.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the choice of images (default: 0)")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--limit", type=positive, metavar="N", help="so many test images only, each class with its share (default: all)")
    measuring.add_argument("--images", type=positive, default=512, metavar="N", help="so many of them for the spikes (default: 512)")
    text = "also accuracy with these numbers of steps, and a picture (default: powers of two up to four times T with --method plain, else none)"
    measuring.add_argument("--curve-steps", nargs="+", type=positive, metavar="N", help=text)
    parser.add_argument("--which", choices=("best", "last"), default="best", help="weights: the best in validation, or the last (default: best)")
    parser.add_argument("--data", metavar="PATH", help="where the data lie now (default: where they were in training)")
    parser.add_argument("--device", default="auto", help="device: cpu, cuda, cuda:1 ...; auto: a GPU where there is one (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="print the folder only")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    parser.set_defaults(run=guarded(run))


def config_of(spec: dict, config: dict) -> dict:
    """The settings of a run whose network has become that of `spec`: what `runs.build_model` makes the same network of.

    spec: as `models.build` takes it. config: the settings of the ANN's run.
    """
    from ..models.options import SHARED

    family = {key: value for key, value in spec.items() if key not in SHARED and key != "name"}
    tables = {key: spec[key] or {} for key in ("neuron_options", "norm_options", "encoding_options")}
    words = {key: spec[key] for key in ("steps", "neuron", "norm", "encoding", "readout")}
    return {**config, "model": spec["name"], "model_options": family, "surrogate": "auto", **words, **tables}


def options_of(arguments: argparse.Namespace, name: str) -> dict:
    """What `conversion.convert` is given. name: of the data."""
    from ..models.options import surrogate_from

    kappa = arguments.kappa
    if kappa is None and arguments.method == "robust" and name in SMALL_KAPPA:
        kappa = SMALL_KAPPA[name]
    chosen = {key: value for key in ("decay", "reset", "surrogate") if (value := getattr(arguments, key)) is not None}
    if "surrogate" in chosen:
        surrogate_from(chosen["surrogate"])  # its own error, before anything runs
    passed = {key: getattr(arguments, key) for key in ("method", "rho", "calibration_steps", "batches", "batch_size", "running")}
    return {**passed, "kappa": kappa, "neuron": "if" if arguments.decay is None else "lif", "neuron_options": chosen}


def calibration_images(images: Tensor, count: int, seed: int) -> Tensor:
    """`count` of the images [N, C, H, W], drawn without repetition, in an order of the seed's; all of them where there are fewer."""
    import torch

    from ..runs import seed_of

    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed_of(seed, "calibration")))[:count]]


def run(arguments: argparse.Namespace) -> int:
    from .. import checkpoints, data
    from ..coding import measure, pictures, text_table
    from ..conversion import convert, rate_errors
    from ..pictures import Curve, errors_by_steps
    from ..recipes import Config
    from ..runs import arithmetic, choose_device
    from ..training import SPLIT_SEED

    out = Path(arguments.out or f"{str(arguments.folder).rstrip('/')}-snn")
    if (out / checkpoints.RUN).exists():
        raise FileExistsError(f"convert: {out} holds a run already; wanted a new folder. Give another --out.")
    device = choose_device(Config(device=arguments.device))
    ann, trained = checkpoints.load_run(arguments.folder, arguments.which, device)
    settings = trained["config"]
    if settings["neuron"] != "relu":
        raise ValueError(
            f"convert: {arguments.folder} is a network of neurons {settings['neuron']!r}; wanted an ANN, of 'relu'. Train one: fastsnn train --ann --out ANOTHER."
        )
    found = data.load(arguments.data or settings["data"])
    if found.fingerprint() != trained["data"]["fingerprint"]:
        raise ValueError(
            f"convert: {arguments.data or settings['data']} holds other images than {arguments.folder} was trained on (fingerprint {found.fingerprint()}, "
            f"wanted {trained['data']['fingerprint']}). Give those of then: --data PATH."
        )
    found = found.limited(train=settings["train_limit"] or None, test=arguments.limit)
    chosen, _ = data.split(found.x_train, found.y_train, validation=settings["validation"], seed=SPLIT_SEED)
    images = calibration_images(found.x_train[chosen], arguments.batches * arguments.batch_size, arguments.seed)
    said = None if arguments.quiet else lambda line: print(f"convert: {line}", file=sys.stderr, flush=True)
    options = options_of(arguments, found.name)
    with arithmetic(settings["precision"], device):
        snn, report = convert(ann, images, arguments.steps, **options, progress=said)
        curve = arguments.curve_steps or ([2**k for k in range(32) if 2**k <= 4 * arguments.steps] if arguments.method == "plain" else [])
        measured = {
            name: measure(model, found.x_test, found.y_test, curve, arguments.images, device=device) for name, model in (("ANN", ann), ("converted", snn))
        }
        errors = rate_errors(ann, snn, _floats(images[: arguments.batch_size], ann), curve) if arguments.method == "plain" else {}
    if not arguments.quiet:
        print(f"{report}\n\n{text_table(measured)}\n")
        if errors:
            print(f"{_errors_table(errors)}\n")
    origin = {"run": str(arguments.folder), "weights": trained["weights"], "seed": arguments.seed, "options": options}
    settings["data"] = arguments.data or settings["data"]  # where fine-tuning finds them
    write(out, snn, trained, {**origin, "report": report.to_dict(), "measured": measured, "rate_errors": errors})
    drawn = pictures(measured, 1 / found.classes)
    if errors:
        lines = [Curve(name, *zip(*points)) for name, points in errors.items()]
        drawn["rates.png"] = errors_by_steps(lines, "theta times rates against the ANN's activations", "relative error")
    for name, picture in drawn.items():
        checkpoints.write(out / name, picture)
    print(out)
    return 0


def _floats(images: Tensor, ann) -> Tensor:
    """Images as the network takes them, on its device."""
    weight = next(ann.parameters())
    return images.to(weight.device, weight.dtype) / (1 if images.is_floating_point() else 255)


def _errors_table(errors: dict[str, list[list[float]]]) -> str:
    """The relative error of each layer's rates, by T."""
    wide = max(map(len, (*errors, "error of rates, T =")))
    first = next(iter(errors.values()))
    lines = [f"{'error of rates, T =':{wide}}  " + "  ".join(f"{count:8}" for count, _ in first)]
    return "\n".join([*lines, *(f"{name:{wide}}  " + "  ".join(f"{error:8.4f}" for _, error in points) for name, points in errors.items())])


def write(out: Path, snn: Network, trained: dict, converted: dict) -> None:
    """The run folder of a converted network. trained: run.json of the ANN's; converted: where it comes from, and what was measured."""
    from .. import checkpoints
    from ..models import count_neurons, count_parameters
    from ..training import versions

    out.mkdir(parents=True, exist_ok=True)
    tensors = {f"{checkpoints.MODEL}{name}": value for name, value in snn.state_dict().items()}
    for name in (checkpoints.BEST, checkpoints.LAST):
        checkpoints.save(out / name, tensors, {"epoch": 0, "step": 0})
    kept = ("format", "defense", "defense_options", "data", "tf32", "processes")
    record = {
        **{name: trained[name] for name in kept},
        "config": {**config_of(snn.spec, trained["config"]), "out": str(out)},
        "model": snn.spec,
        "parameters": count_parameters(snn),
        "neurons": count_neurons(snn),
        "versions": versions(),
        "finished": True,
        "steps": 0,
        "seconds": 0.0,
        "best": None,
        "converted": converted,
    }
    checkpoints.write_json(out / checkpoints.RUN, record)  # the last: a folder without it is no run
