"""Conversion of ANNs: balancing against a loop that stores everything, rates against activations, modules from elsewhere, errors."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from fastsnn import convert, models
from fastsnn.attacks import PGD
from fastsnn.conversion import METHODS, Report, balancing, rate_errors
from fastsnn.conversion.calibration import Ranked
from fastsnn.neurons import Neuron
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def draw() -> Tensor:
    return torch.rand(18, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


IMAGES = draw()


class Block(nn.Module):
    """torchvision's BasicBlock: one ReLU called twice, in place; `+=`."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or inputs != channels:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1, self.layer2 = nn.Sequential(Block(4, 4)), nn.Sequential(Block(4, 6, 2))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class VGG(nn.Module):
    """torchvision's VGG with average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.AvgPool2d(2, 2),
            nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.AvgPool2d(2, 2),
        )  # fmt: skip
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(nn.Linear(24, 12), nn.ReLU(True), nn.Dropout(), nn.Linear(12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features((x - 0.5) / 0.25))
        return self.classifier(x.view(x.size(0), -1))


class PreActivation(nn.Module):
    """Functions in place of modules, and a sum of what is constant over T with what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.conv1 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(4), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, x = x.shape[0], self.conv(x)
        x = torch.add(x, self.conv1(F.relu(self.norm1(x))))
        return self.fc(F.avg_pool2d(self.norm(x).relu(), 2).reshape(batch, -1))


def settled(ann: nn.Module) -> nn.Module:
    """With weights drawn and running statistics of the images."""
    torch.manual_seed(1)
    for module in ann.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
        elif getattr(module, "weight", None) is not None and hasattr(module, "running_mean"):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    norms = [module for module in ann.double().train().modules() if hasattr(module, "momentum")]
    for momentum in (1.0, 0.1):
        for module in norms:
            module.momentum = momentum
        with torch.no_grad():
            ann(IMAGES[:6].clone())
    return ann.eval()


def network(name: str, **options) -> nn.Module:
    return settled(models.build(name, image=(2, 8, 8), classes=3, neuron="relu", **options))


CASES = {
    "small_cnn": lambda: network("small_cnn", widths=(4, 6)),
    "resnet20": lambda: network("resnet20"),
    "vgg": lambda: settled(VGG()),
    "resnet": lambda: settled(ResNet()),
    "preactivation": lambda: settled(PreActivation()),
}
every_case = pytest.mark.parametrize("name", CASES)


# ---- the value of a rank ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 0.997, 0.9, 0.5, 1e-9])
@pytest.mark.parametrize("times", [1, 7])
def test_a_rank_is_found_in_parts_as_in_the_whole(rho, times):
    numbers = torch.randn(3001, generator=torch.Generator().manual_seed(0)).mul(20).round() / 20  # with ties
    ordered = numbers.repeat(times).sort().values
    for sizes in ([3001], [1, 3000], [10] * 300 + [1]):
        ranked = Ranked(len(ordered), rho)
        for part in numbers.split(sizes):
            ranked.add(part, times)
        assert ranked.value() == ordered[round(rho * (len(ordered) - 1))].item()
    ranked.add(torch.tensor([math.nan]), times)
    assert math.isnan(ranked.value())


# ---- balancing -------------------------------------------------------------------------------------------------------


class Naive:
    """Robust balancing of one mini-batch that holds every pre-activation of all steps [T, N, ...]: a loop over steps in plain PyTorch."""

    def __init__(self, images: Tensor, steps: int, thresholds: list[float], decay: float, soft: bool) -> None:
        self.x, self.thresholds, self.decay, self.soft = images.repeat(steps, 1, 1, 1), thresholds, decay, soft
        self.steps, self.inputs = steps, []

    def norm(self, x: Tensor, module: nn.Module) -> Tensor:
        return F.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=module.eps)

    def fire(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        if len(self.inputs) > len(self.thresholds):
            raise StopIteration
        theta, v, spikes = self.thresholds[len(self.inputs) - 1], 0.0, []
        for current in x.unflatten(0, (self.steps, -1)):
            h = self.decay * v + current
            spikes.append((h >= theta).double())
            v = h - theta * spikes[-1] if self.soft else h * (1 - spikes[-1])
        return torch.cat(spikes)

    def small_cnn(self, net) -> None:
        x = self.x
        for stage in (net.features[0], net.features[2]):
            x = self.fire(self.norm(F.conv2d(x, stage.conv.weight, stage.conv.bias, padding=1), stage.norm))
            x = F.avg_pool2d(x, 2)

    def vgg(self, net) -> None:
        x = (self.x - 0.5) / 0.25
        for place in (0, 4):
            conv = net.features[place]
            x = F.avg_pool2d(self.fire(self.norm(F.conv2d(x, conv.weight, conv.bias, padding=1), net.features[place + 1])), 2)
        self.fire(F.linear(x.flatten(1), net.classifier[0].weight, net.classifier[0].bias))

    def resnet(self, net) -> None:
        x = self.fire(self.norm(F.conv2d(self.x, net.conv1.weight, padding=1), net.bn1))
        for block, stride in ((net.layer1[0], 1), (net.layer2[0], 2)):
            shortcut = x if stride == 1 else self.norm(F.conv2d(x, block.downsample[0].weight, stride=2), block.downsample[1])
            y = self.fire(self.norm(F.conv2d(x, block.conv1.weight, stride=stride, padding=1), block.bn1))
            x = self.fire(self.norm(F.conv2d(y, block.conv2.weight, padding=1), block.bn2) + shortcut)

    def preactivation(self, net) -> None:
        x = F.conv2d(self.x, net.conv.weight, net.conv.bias, padding=1)
        x = x + F.conv2d(self.fire(self.norm(x, net.norm1)), net.conv1.weight, net.conv1.bias, padding=1)
        self.fire(self.norm(x, net.norm))


def naive_values(name: str, ann: nn.Module, batches, steps: int, rho: float, decay: float, soft: bool) -> list[list[float]]:
    values: list[list[float]] = []
    while True:
        row = []
        for images in batches:
            run = Naive(images, steps, [max(found) for found in values], decay, soft)
            try:
                getattr(run, name)(ann)
                return values
            except StopIteration:
                numbers = run.inputs[-1].flatten()
                row.append(numbers.kthvalue(1 + round(rho * (len(numbers) - 1))).values.item())
        values.append(row)


@pytest.mark.parametrize("name", [name for name in CASES if hasattr(Naive, name)])
@pytest.mark.parametrize("memory, chunk", [(0, 3000), (20_000, 5000), (2**30, 2**25)], ids=["nothing kept", "a part kept", "all kept"])
def test_balancing_is_that_of_a_loop_that_stores_everything(monkeypatch, name, memory, chunk):
    monkeypatch.setattr(balancing, "CHUNK", chunk)
    ann, steps = CASES[name](), 11
    soft = name in ("vgg", "resnet")
    options = {"decay": 0.9, "reset": "soft"} if soft else {"decay": 1.0}
    with torch.no_grad():
        want = naive_values(name, ann, IMAGES[:9].split(5), steps, 0.98, options["decay"], soft)
    lines = []
    given = {"rho": 0.98, "kappa": 0.3, "calibration_steps": steps, "batch_size": 5, "memory": memory}
    _, report = convert(ann, IMAGES[:9], 4, neuron="lif", neuron_options=options, progress=lines.append, **given)
    found = torch.tensor([layer.batch_values for layer in report.layers], dtype=torch.float64)
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
    assert [layer.threshold for layer in report.layers] == [max(0.3 * max(layer.batch_values), 0.03) for layer in report.layers]
    assert len(lines) == len(want) and (report.batches, report.images, report.calibration_steps) == (2, 9, steps)


def test_without_a_norm_balancing_is_exact(monkeypatch):
    ann = network("small_cnn", widths=(4, 6), norm="none")
    monkeypatch.setattr(balancing, "CHUNK", 4000)
    monkeypatch.setattr(Naive, "norm", lambda self, x, module: x)
    with torch.no_grad():
        want = naive_values("small_cnn", ann, IMAGES.split(7), 9, 0.95, 1.0, False)
    _, report = convert(ann, IMAGES, 4, rho=0.95, calibration_steps=9, batch_size=7)
    assert [list(layer.batch_values) for layer in report.layers] == want


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation returns."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, Tensor):
                self.found = max(self.found, part.untyped_storage().nbytes() // part.element_size())
        return result


def test_no_tensor_grows_with_the_steps_of_the_calibration(monkeypatch):
    monkeypatch.setattr(balancing, "CHUNK", 4096)  # 4 steps of the first layer's 256 neurons with 4 images
    largest = []
    for steps in (20, 200):
        with Largest() as watch:
            convert(network("small_cnn", widths=(4, 6)), IMAGES[:4], 4, rho=1.0, calibration_steps=steps, memory=0)
        largest.append(watch.found)
    assert largest[0] == largest[1] <= 2 * 4096


def test_the_floor_holds_and_is_told():
    snn, report = convert(network("small_cnn", widths=(4,)), IMAGES, 4, kappa=1e-6, calibration_steps=3, floor=0.03)
    assert [layer.threshold.item() for _, layer in snn.spiking_layers()] == [0.03]
    assert any("below the floor" in note for note in report.notes)


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["tdbn", "bn", "none"])
def test_a_network_keeps_its_weights_and_has_a_spec(norm):
    """Its ANN twin with the first one's running statistics is the first one: tdBN's factor stands in the weights."""
    ann = network("resnet20", norm=norm, norm_options={"threshold": 0.5} if norm == "tdbn" else None)
    before = copy.deepcopy(ann.state_dict())
    snn, _ = convert(ann, IMAGES[:3], 3, calibration_steps=4, neuron_options={"surrogate": "triangle:1.0"})
    assert all(torch.equal(value, before[name]) for name, value in ann.state_dict().items())
    back = models.build(**json.loads(json.dumps(snn.spec))).double().eval()
    back.load_state_dict(snn.state_dict())
    assert torch.equal(back(IMAGES[:3]), snn(IMAGES[:3])) and snn.steps == 3 and not snn.training
    statistics = {name: value for name, value in snn.state_dict().items() if name.endswith(("running_mean", "running_var"))}
    assert all(torch.equal(value, torch.full_like(value, name.endswith("var"))) for name, value in statistics.items())
    again = models.twin(snn).eval()
    again.load_state_dict({name: value for name, value in before.items() if "running" in name}, strict=False)
    torch.testing.assert_close(again(IMAGES[:3]), ann(IMAGES[:3]), rtol=1e-9, atol=1e-9)
    assert {name for name, _ in snn.named_parameters() if "threshold" in name} == {f"{name}.threshold" for name, _ in snn.spiking_layers()}


@pytest.mark.parametrize("name", ["small_cnn", "vgg"])
def test_running_statistics_are_calibrated(name):
    ann = CASES[name]()
    snn, report = convert(ann, IMAGES, 4, calibration_steps=5, batch_size=6, running="calibrate")
    assert not any("start anew" in note for note in report.notes)
    conv, norm = (ann.features[0].conv, snn.features[0].norm) if name == "small_cnn" else (ann.features[0], snn.body.get_submodule("features.1"))
    x = IMAGES if name == "small_cnn" else (IMAGES - 0.5) / 0.25
    maps = [conv(part) for part in x.split(6)]
    torch.testing.assert_close(norm.running_mean, torch.stack([part.mean((0, 2, 3)) for part in maps]).mean(0))
    repeats = 4 if name == "small_cnn" else 1  # fastsnn's norm counts a constant current as T steps
    torch.testing.assert_close(norm.running_var, torch.stack([part.repeat(repeats, 1, 1, 1).var((0, 2, 3)) for part in maps]).mean(0))
    assert norm.momentum == 0.1


# ---- plain conversion ------------------------------------------------------------------------------------------------


def activations(ann: nn.Module, images: Tensor) -> list[Tensor]:
    """What each ReLU returns, in the order in which they run, functions too."""
    found: list[Tensor] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, kinds, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") == "relu" and not (found and found[-1] is result):
                found.append(result.clone())
            return result

    with torch.no_grad(), Watch():
        ann(images)
    return found


@every_case
def test_rates_approach_activations_like_one_over_t(name):
    """theta*rate against the ANN's activation: in the first layer within theta/T; everywhere, and in the logits, closer at 8 times the steps by
    more than the sqrt(8) of chance. Through twenty layers the law shows later."""
    few, many = (256, 2048) if name == "resnet20" else (64, 512)
    ann, images, errors, wrong = CASES[name](), IMAGES[:1] if name == "resnet20" else IMAGES[:3], {}, {}
    for module in ann.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    want = activations(ann, images)
    with torch.no_grad():
        logits = ann(images)
        for steps in (few, many):
            snn, report = convert(ann, images, steps, method="plain")
            rates: dict[Neuron, Tensor] = {}
            layers = [module for module in snn.modules() if isinstance(module, Neuron)]
            for layer in layers:
                layer.register_forward_hook(lambda layer, inputs, spikes: rates.__setitem__(layer, spikes.mean(0)))
            wrong[steps] = (snn(images) - logits).abs().max().item()
            assert len(rates) == len(layers) == len(want) == len(report.layers)
            errors[steps] = [(rate - value.reshape(rate.shape) / layer.threshold).abs().max().item() for (layer, rate), value in zip(rates.items(), want)]
            assert errors[steps][0] <= 1 / steps + 1e-12
    for before, after in zip(errors[few], errors[many]):
        assert after <= before / 3
    assert wrong[many] <= wrong[few] / 3 and wrong[many] < 0.1 * (logits.max() - logits.min()).item()


def test_errors_of_rates():
    """Of the first layer by hand: floor(T*a/theta) spikes after T steps of the current a; of the second: falling, at 16 times the steps to less than a quarter."""
    ann = network("small_cnn", widths=(4, 6), norm="none")
    snn, report = convert(ann, IMAGES, 4, method="plain")
    found = rate_errors(ann, snn, IMAGES[:5], (4, 64))
    assert list(found) == [layer.name for layer in report.layers]
    a, theta = F.relu(ann.features[0].conv(IMAGES[:5])), report.layers[0].threshold
    for (steps, error), count in zip(found["features.0.neuron"], (4, 64)):
        assert steps == count
        # Where rounding decides between two counts, either is right.
        spikes = torch.floor(count * a / theta + 1e-9)
        assert error == pytest.approx(((theta * spikes / count - a).abs().sum() / a.abs().sum()).item(), rel=1e-6)
    assert found["features.2.neuron"][1][1] < found["features.2.neuron"][0][1] / 4
    with pytest.raises(ValueError, match="rate_errors: the layers of snn are"):
        rate_errors(network("small_cnn", widths=(4, 6, 8)), snn, IMAGES, (4,))


def test_plain_values_are_ranks_of_the_activations():
    ann = settled(VGG())
    want = activations(ann, IMAGES)
    _, report = convert(ann, IMAGES, 4, method="plain", rho=0.9)
    for layer, value in zip(report.layers, want, strict=True):
        assert layer.threshold == layer.value == value.flatten().sort().values[round(0.9 * (value.numel() - 1))].clamp(min=0.03).item()


# ---- modules from elsewhere ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vgg", "resnet", "preactivation"])
def test_a_module_from_elsewhere_runs_learns_and_is_attacked(name, method):
    ann = CASES[name]()
    before = copy.deepcopy(ann)
    snn, report = convert(ann, IMAGES, 4, method=method, calibration_steps=5, running="calibrate", readout="sum")
    assert torch.equal(ann(IMAGES), before(IMAGES)) and str(ann) == str(before)
    weights = {key: value for key, value in ann.state_dict().items() if "running" not in key and "tracked" not in key}
    assert all(torch.equal(snn.state_dict()[f"body.{key}"], value) for key, value in weights.items())
    twin = copy.deepcopy(snn)
    assert snn(IMAGES).shape == (18, 3) and torch.equal(twin(IMAGES), snn(IMAGES))
    adversarial = PGD(eps="8/255", steps=2, seed=0)(snn, IMAGES, torch.zeros(18, dtype=torch.int64))
    assert 0 < (adversarial - IMAGES).abs().max() <= 8 / 255 + 1e-12
    snn.train()
    snn(IMAGES).square().sum().backward()
    thresholds = [module.threshold for module in snn.modules() if isinstance(module, Neuron)]
    assert len(thresholds) == len(report.layers) and all(theta.grad is not None for theta in thresholds)
    assert all(parameter.grad is not None for parameter in snn.parameters())


@pytest.mark.parametrize("neuron, options", [("if", {}), ("lif", {"decay": 0.9, "learn": ["decay"]}), ("plif", {"tau": 3.0})], ids=str)
@pytest.mark.parametrize("name", ["small_cnn", "preactivation"])
def test_neurons_by_name(name, neuron, options):
    ann = CASES[name]()
    snn, _ = convert(ann, IMAGES, 4, neuron=neuron, neuron_options={**options, "surrogate": "triangle:0.5"}, calibration_steps=5)
    layers = [module for module in snn.modules() if isinstance(module, Neuron)]
    assert all(type(layer) is models.NEURONS[neuron].make and layer.surrogate.values[0] == 0.5 for layer in layers)
    learned = {"if": 1, "lif": 2, "plif": 2}[neuron]  # the threshold, and a leak
    assert sum("neuron" in key or "relu" in key for key, _ in snn.named_parameters()) == learned * len(layers) > 0


def test_work_in_place_changes_what_is_read_later_but_not_the_images():
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(2, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x.mul_(2))
            self.relu(y)
            return self.fc(y.mean((2, 3)))

    ann, images = settled(Aliased()), draw()
    before = images.clone()
    snn, _ = convert(ann, images, 1024, method="plain")
    convert(ann, images, 4, calibration_steps=3, running="calibrate")
    assert torch.equal(images, before)
    torch.testing.assert_close(snn(images.clone()), ann(images.clone()), rtol=0, atol=5e-3)


# ---- data and report -------------------------------------------------------------------------------------------------


def test_images_come_as_a_tensor_as_bytes_or_from_a_loader():
    ann = network("small_cnn", widths=(4, 6))
    pixels = (IMAGES * 255).round().to(torch.uint8)
    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(pixels.double() / 255, torch.zeros(18)), batch_size=5)
    reports = [convert(ann, data, 4, calibration_steps=5, batch_size=5, batches=2)[1] for data in (pixels, pixels.double() / 255, labelled, list(pixels.split(5)))]
    assert all(report.layers == reports[0].layers and report.images == 10 for report in reports)


@pytest.mark.parametrize("encoding, options, steps", [("poisson", None, 9), ("rsc", {"sigma": 0.1}, 9), ("frequency", {"radii": [4, 2]}, 2)])
def test_encodings_that_differ_between_steps(monkeypatch, encoding, options, steps):
    """Random ones are drawn alike in each pass, and so kept or not kept is the same; those of T steps are balanced over T."""
    ann = network("small_cnn", widths=(4, 6), encoding=encoding, encoding_options=options, steps=2)
    found = []
    for memory in (0, 2**30):
        monkeypatch.setattr(balancing, "CHUNK", 8000)
        torch.manual_seed(3)
        snn, report = convert(ann, IMAGES, 2, calibration_steps=9, memory=memory)
        found.append(report)
    assert found[0].layers == found[1].layers and report.calibration_steps == steps
    assert snn.spec["encoding"] == encoding and snn(IMAGES).shape == (18, 3)


def test_a_report_is_a_table_and_json():
    _, report = convert(network("small_cnn", widths=(4, 6)), IMAGES, 4, calibration_steps=5)
    assert isinstance(report, Report) and json.loads(json.dumps(report.to_dict())) == report.to_dict()
    text = str(report)
    for word in ("features.0.neuron", "256", "2 TDBN -> BatchNorm", "2 ReLU -> IF", "s a mini-batch", "GiB"):
        assert word in text
    assert [layer.neurons for layer in report.layers] == [4 * 64, 6 * 16]
    assert 2**20 < report.peak_memory < 2**42 and 0 < report.seconds_per_batch <= report.seconds


# ---- errors ----------------------------------------------------------------------------------------------------------


def with_layer(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), layer, nn.Flatten(), nn.Linear(4, 3))


class Calls(nn.Module):
    def __init__(self, function, *shared: nn.Module) -> None:
        super().__init__()
        self.conv, self.relu, self.function = nn.Conv2d(2, 4, 3), nn.ReLU(), function
        self.shared = nn.ModuleList(shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.relu(self.conv(x)))


def recurrent(self, x: Tensor) -> Tensor:
    out, _ = self.shared[0](x.flatten(2))
    return out


def tied() -> nn.Module:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    return Calls(lambda self, x: self.shared[1](self.shared[0](x)), first, second)


REFUSED = {
    "max pooling": (lambda: with_layer(nn.MaxPool2d(2)), "2 is a MaxPool2d.*nn.AvgPool2d"),
    "gelu": (lambda: with_layer(nn.GELU()), "2 is a GELU.*nn.ReLU in its place"),
    "layer norm": (lambda: with_layer(nn.GroupNorm(2, 4)), "2 is a GroupNorm.*batch norm"),
    "softmax": (lambda: with_layer(nn.Softmax(1)), "2 is a Softmax"),
    "max pooling as a function": (lambda: Calls(lambda self, x: F.max_pool2d(x, 2)), "Calls calls .*max_pool2d.*nn.AvgPool2d"),
    "max as a method": (lambda: Calls(lambda self, x: x.amax((2, 3))), "calls amax"),
    "recurrent": (lambda: Calls(recurrent, nn.LSTM(36, 3)), r"shared.0 is a LSTM.*run over time"),
    "weights used twice": (lambda: Calls(lambda self, x: self.shared[0](self.shared[0](x)), nn.Conv2d(4, 4, 1)), r"shared.0 is a Conv2d, and it runs a second time"),
    "weights shared": (tied, r"shared.1 is a Conv2d, and it shares weights with shared.0"),
    "a product": (lambda: Calls(lambda self, x: x * x), "calls mul of two signals"),
    "a quotient": (lambda: Calls(lambda self, x: 1 / x), "of two signals"),
    "a course by values": (lambda: Calls(lambda self, x: x if x.sum() > 0 else -x), "cannot be followed|calls sum"),
    "no relu": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), "no ReLU"),
    "no parameters": (lambda: nn.ReLU(), "no parameters"),
    "several outputs": (lambda: Calls(lambda self, x: (x, x)), "returns a tuple"),
    "spiking": (lambda: models.small_cnn(image=(2, 8, 8)), "spiking already"),
    "a norm of steps": (lambda: models.small_cnn(image=(2, 8, 8), neuron="relu", norm="tebn"), "norm tebn"),
    "no spec": (lambda: models.small_cnn(image=(2, 8, 8), neuron=lambda: nn.ReLU()), "no spec"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named(case, method):
    make, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        convert(make().double(), IMAGES, 4, method=method)


WRONG = {
    "data is missing": ({"data": None}, ValueError),
    "holds no image": ({"data": IMAGES[:0]}, ValueError),
    "data is a int": ({"data": 3}, TypeError),
    "a mini-batch is a dict": ({"data": [{}]}, TypeError),
    "data is int64": ({"data": IMAGES.long()}, TypeError),
    "steps is 0": ({"steps": 0}, ValueError),
    "steps is 2.0": ({"steps": 2.0}, ValueError),
    "calibration_steps is -1": ({"calibration_steps": -1}, ValueError),
    "batches is 0": ({"batches": 0}, ValueError),
    "method 'plane' is unknown.*'plain'": ({"method": "plane"}, ValueError),
    "running 'keep'": ({"running": "keep"}, ValueError),
    "rho is 99.7": ({"rho": 99.7}, ValueError),
    "kappa is 0": ({"kappa": 0}, ValueError),
    "floor is -1": ({"floor": -1}, ValueError),
    "neuron 'noisy'": ({"neuron": "noisy"}, ValueError),
    "no option 'decai'": ({"neuron": "lif", "neuron_options": {"decai": 0.5}}, TypeError),
    "sets a threshold": ({"neuron_options": {"threshold": 0.5}}, ValueError),
    "fire='none'": ({"neuron_options": {"fire": "none"}}, ValueError),
    "readout 'sum' is for modules from elsewhere": ({"readout": "sum"}, ValueError),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words):
    given, kind = WRONG[words]
    ann = models.small_cnn(image=(2, 8, 8), neuron="relu", widths=(4,)).double()
    with pytest.raises(kind, match=words):
        convert(ann, **{"data": IMAGES, "steps": 4, "calibration_steps": 2, **given})


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_named(method):
    ann = network("small_cnn", widths=(4, 6))
    ann.features[2].conv.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"features.2.neuron holds NaN"):
        convert(ann, IMAGES, 4, method=method, calibration_steps=3)


def test_a_run_needs_a_module():
    with pytest.raises(TypeError, match="load_run"):
        convert("runs/ann", IMAGES)
