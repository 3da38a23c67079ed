"""What a conversion did: which layers became what, the thresholds, and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Layer:
    """One layer of neurons of a converted network.

    name: of the layer in the spiking network. value: the highest of `batch_values`, the rho value of the layer's input in
    each mini-batch, in units of potential. threshold: what was set, `max(kappa*value, floor)`. neurons: for one image.
    """

    name: str
    threshold: float
    value: float
    batch_values: tuple[float, ...]
    neurons: int


@dataclass(frozen=True)
class Report:
    """What `convert` did.

    method, steps (T), rho, kappa, floor: as given. calibration_steps: T_c; 1 for plain conversion. images: how many were looked at, in
    `batches` mini-batches. layers: of neurons, in the order in which they run. converted: (name, what it was, what it became) of every
    module or function that has weights or became something else. seconds: of balancing and what follows; seconds_per_batch: of
    balancing, for each mini-batch. peak_memory: bytes, the most that the process ever had resident; on a GPU the most that was
    allocated meanwhile. notes: what a reader should know.

    `print(report)` shows it as a table; `to_dict()` is JSON-able.
    """

    method: str
    steps: int
    rho: float
    kappa: float
    floor: float
    calibration_steps: int
    images: int
    batches: int
    seconds: float
    seconds_per_batch: float
    peak_memory: int
    layers: tuple[Layer, ...] = ()
    converted: tuple[tuple[str, str, str], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict:
        """Everything as numbers, text, lists and dicts."""
        found = asdict(self)
        found["layers"] = [{**layer, "batch_values": list(layer["batch_values"])} for layer in found["layers"]]
        return found | {"converted": [list(row) for row in self.converted], "notes": list(self.notes)}

    @property
    def cost(self) -> str:
        """One line: images, seconds, memory."""
        return (
            f"balanced on {self.images} images in {self.batches} mini-batches, T_c {self.calibration_steps}: {self.seconds_per_batch:.3g} s a mini-batch, "
            f"{self.seconds:.3g} s in all, peak memory {self.peak_memory / 2**30:.2f} GiB"
        )

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for _, was, became in self.converted:
            words = f"{was} -> {became}" if was != became else f"{was} kept"
            counts[words] = counts.get(words, 0) + 1
        width = max([len(layer.name) for layer in self.layers] + [len("layer")])
        lines = [f"{self.method} conversion to T = {self.steps}: " + ", ".join(f"{count} {words}" for words, count in counts.items())]
        lines += [f"{'layer':{width}}  {'neurons':>9}  {'value':>10}  {'threshold':>10}"]
        lines += [f"{layer.name:{width}}  {layer.neurons:>9,}  {layer.value:>10.4g}  {layer.threshold:>10.4g}" for layer in self.layers]
        return "\n".join([*lines, self.cost, *self.notes])
