"""Networks of spiking layers, and their ANN twins.

    model = fastsnn.models.vgg11(classes=10, steps=8, norm="tdbn", normalise="cifar10")
    logits, statistics = model(images, statistics=("mean", "var"))    # one entry for each spiking layer

Every builder takes these options by name, and its family's own:

    classes        number of classes, default 10
    image          (channels, height, width), default (3, 32, 32)
    steps          T, default 4
    norm           `tdbn`, `bn`, `tebn`, `bntt`, `none`; norm_options: a dict for `fastsnn.norm.make_norm`
    encoding       `direct` and the others of `fastsnn.encodings`; encoding_options: a dict for its class
    neuron         `if`, `lif`, `plif`, `noisy`, `feel`, `dlif`, `stog` (`fastsnn.paper_neurons`), `relu` (an ANN), or a callable that makes a module
    neuron_options dict of decay, threshold, reset, surrogate (an object, or text such as "triangle:1.0"), learn, ...
    normalise      None: pixels as they are; a name of NORMALISATIONS (no effect with encodings that take pixels); (mean, std)
    readout        from the classifier's output x[t] to logits: `mean` over t, `sum`, or `membrane`, the mean over t of
                   v[t] = decay*v[t-1] + x[t] with the neurons' first decay

With `direct` every step gets the same image: what comes before the first spikes is computed once, not T times.
An ANN (`neuron="relu"`) has one step, unless its encoding or norm differs between steps.
"""

from __future__ import annotations

from ..adjoints import nearest
from .network import Network, Pass, count_neurons, count_parameters, each_step, twin
from .options import MODELS, NEURONS, NORMALISATIONS, READOUTS, Normalise, surrogate_from, surrogate_text
from .resnet import Combine, resnet20, wrn16_4
from .vgg import small_cnn, vgg11, vgg11_tiny, vgg16

__all__ = [
    "MODELS",
    "NEURONS",
    "NORMALISATIONS",
    "READOUTS",
    "Combine",
    "Network",
    "Normalise",
    "Pass",
    "build",
    "count_neurons",
    "count_parameters",
    "each_step",
    "resnet20",
    "small_cnn",
    "surrogate_from",
    "surrogate_text",
    "twin",
    "vgg11",
    "vgg11_tiny",
    "vgg16",
    "wrn16_4",
]


def build(name: str, **options) -> Network:
    """The network of that name: a row of MODELS, called with the options. `build(**model.spec)` makes the same network
    (not its values: those are in its state_dict).

    Raises ValueError for an unknown name, TypeError for an unknown option.

    >>> model = fastsnn.models.build("small_cnn", image=(1, 8, 8))
    """
    if name not in MODELS:
        raise ValueError(f"models.build: {name!r} is unknown; wanted one of {', '.join(MODELS)}.{nearest(name, tuple(MODELS))}")
    return MODELS[name](**options)
