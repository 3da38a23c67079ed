"""The networks: their counts, what flows through them, and what comes back."""

import copy
import functools
import json
import math

import fastsnn
import pytest
import torch
import torch.nn.functional as F
from cases import assert_close, assert_same_bits
from fastsnn import models, surrogates
from fastsnn.encodings import ENCODINGS, Encoding
from fastsnn.models import MODELS, NEURONS
from fastsnn.models.network import HalfSize
from fastsnn.models.options import Parts
from fastsnn.models.resnet import Basic, PreActivation
from fastsnn.norm import NORMS
from torch import Tensor, nn

#: The smallest images that each network takes.
SMALLEST = {"vgg11": (3, 8, 8), "vgg11_tiny": (3, 16, 16), "vgg16": (3, 32, 32), "wrn16_4": (3, 8, 8), "resnet20": (3, 8, 8), "small_cnn": (3, 8, 8)}
#: One of each kind, small enough to train a step.
FAMILIES = ("wrn16_4", "resnet20", "small_cnn")
STEPS = 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make(name: str, **options) -> models.Network:
    torch.manual_seed(0)
    return models.build(name, **{"image": SMALLEST[name], "steps": STEPS, "classes": 5, **options})


def images_for(model: models.Network, batch: int = 4, seed: int = 0) -> Tensor:
    return draw(batch, *model.image, seed=seed).to(next(model.parameters()).dtype)


def test_every_model_is_listed_here():
    assert set(SMALLEST) == set(MODELS) and all(getattr(models, name) is MODELS[name] for name in MODELS)


@pytest.mark.parametrize(
    ("name", "options", "neurons", "parameters"),
    [
        ("vgg11", {}, 286_720, 61_377_034),
        ("vgg11", {"classes": 100}, 286_720, 61_745_764),
        ("vgg11", {"bias": False, "dropout": 0.2}, 286_720, 61_365_824),
        ("vgg11", {"bias": False, "dropout": 0.2, "classes": 100}, 286_720, 61_734_464),
        ("wrn16_4", {}, 475_136, 2_748_902),
        ("wrn16_4", {"classes": 100}, 475_136, 2_772_032),
        ("resnet20", {}, 188_416, 272_482),
        ("vgg11_tiny", {}, 610_304, 12_139_584),
        ("vgg16", {}, 284_672, 33_634_240),
        ("small_cnn", {}, 57_344, 94_986),
        ("small_cnn", {"image": (1, 8, 8), "widths": (8, 16)}, 8 * 64 + 16 * 16, 8 * 9 + 8 + 16 + 16 * 8 * 9 + 16 + 32 + 16 * 10 + 10),
    ],
)
def test_counts(name, options, neurons, parameters):
    with torch.device("meta"):
        model = models.build(name, neuron_options={"backend": "reference"}, **options)
        assert models.count_neurons(model) == models.count_neurons(models.twin(model)) == neurons
    assert models.count_parameters(model) == parameters


def test_counting_leaves_a_model_as_it_was():
    model = make("small_cnn")
    model.classifier.eval()
    before = copy.deepcopy(model.state_dict())
    models.count_neurons(model)
    assert model.training and model.features[0].norm.training and not model.classifier.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_statistics(name):
    model = make(name)
    images = images_for(model, 2)
    logits = model(images)
    again, statistics = model.eval()(images, statistics=("mean", "var", "rate"))
    layers = model.spiking_layers()
    assert logits.shape == again.shape == (2, 5) and logits.dtype == torch.float32
    assert len(statistics) == len(layers) > 0
    with fastsnn.record(model, "mean", "rate") as recorded:
        assert_same_bits("logits", model(images).detach(), again.detach())
    assert list(recorded) == [layer for layer, _ in layers], "the order of spiking_layers() is not that of the pass"
    for (layer, _), found in zip(layers, statistics):
        assert found.mean.shape == found.var.shape == (STEPS, recorded[layer][0].mean.shape[1])
        assert_same_bits(layer, found.mean.detach(), recorded[layer][0].mean.detach())
        assert found.guard is None
    assert any(found.rate.any() for found in statistics)


def test_guard_is_passed_on():
    model = make("small_cnn")
    _, statistics = model(images_for(model), statistics=("guard",), guard=(0.5, 2))
    assert all(found.guard.shape[0] == STEPS and (found.guard > 0).any() for found in statistics)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_parameter(name):
    model = make(name, neuron="lif", neuron_options={"learn": ["threshold"]})
    images = images_for(model).requires_grad_()
    logits, statistics = model(images, statistics=("mean", "var"))
    (logits.square().sum() + sum(found.var.sum() for found in statistics)).backward()
    assert images.grad.any()
    for parameter, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all() and value.grad.any(), parameter


@pytest.mark.parametrize(("statistics", "backend"), [((), "eager"), (("mean", "var"), "aot_eager")], ids=["logits", "statistics"])
def test_compile_full_graph_equals_eager(statistics, backend):
    torch._dynamo.reset()
    model = make("small_cnn", normalise="cifar10", widths=(4, 8), neuron_options={"threshold": 0.5}, norm="bn")
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    images, found = images_for(model), []
    for run in (model, compiled):
        x = images.clone().requires_grad_()
        out = run(x, statistics=statistics)
        logits, rows = out if statistics else (out, [])
        loss = logits.square().sum() + sum(row.mean.sum() + row.var.sum() for row in rows)
        found.append([logits, *(row.mean for row in rows), *torch.autograd.grad(loss, [x, *run.parameters()])])
    assert len(found[0]) == len(found[1]) and found[0][0].any()
    for number, (want, got) in enumerate(zip(*found)):
        assert_close(f"result {number}", got, want, 1e-5 * (1 + want.abs().max().item()))


@pytest.mark.parametrize("kind", [PreActivation, Basic])
def test_a_block_is_one_graph(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = kind(Parts("wrn16_4", models.options.SHARED), 4, 8, 2)

    def call(x: Tensor) -> tuple:
        run = models.Pass(("mean", "var"))
        return block(x, run), run.found

    x = 8 * draw(4, 2, 4, 6, 6)
    (want, want_found), (got, found) = call(x), torch.compile(call, fullgraph=True, backend="eager")(x)
    assert_same_bits("maps", got.detach(), want.detach())
    assert want.any()
    assert len(found) == len(want_found) == 2
    for row, want_row in zip(found, want_found):
        assert_same_bits("mean", row.mean.detach(), want_row.mean.detach())
        assert_same_bits("var", row.var.detach(), want_row.var.detach())


class Repeat(Encoding):
    """Direct encoding written out: the image T times."""

    after_normalisation = True

    def encode(self, images: Tensor) -> Tensor:
        return images.repeat(self.steps, 1, 1, 1, 1)


@pytest.mark.parametrize(("name", "norm"), [*(("small_cnn", norm) for norm in NORMS), ("resnet20", "tdbn"), ("wrn16_4", "bn")])
def test_a_constant_current_equals_repeated_images(name, norm):
    threshold = 0.1 if norm == "none" else 1.0  # or nothing spikes
    constant = make(name, norm=norm, normalise="cifar10", neuron_options={"backend": "reference", "threshold": threshold}).double()
    repeated = copy.deepcopy(constant)
    repeated.encoding = Repeat(STEPS)
    found = []
    for model in (constant, repeated):
        x = images_for(model).requires_grad_()
        logits = model(x)
        logits.square().sum().backward()
        found.append({"logits": logits, "images": x.grad, **{n: p.grad for n, p in model.named_parameters()}, **dict(model.named_buffers())})
    assert found[0]["logits"].any()
    for what, want in found[1].items():
        assert_close(what, found[0][what].double(), want.double(), 1e-9 * (1 + want.abs().max().item()))


@pytest.mark.parametrize(("name", "encoding", "steps"), [*((name, "direct", 1) for name in MODELS), ("small_cnn", "rsc", STEPS)])
def test_direct_encoding_computes_the_first_convolution_once(name, encoding, steps):
    seen = {}
    with torch.device("meta"):
        model = make(name, encoding=encoding, neuron_options={"backend": "reference"})
        for layer, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda module, args, layer=layer: seen.update({layer: args[0].numel()}))
        model.eval()(torch.zeros(2, *model.image))
    counts = list(seen.values())
    assert counts[0] == steps * 2 * math.prod(model.image)
    assert counts[1] % (STEPS * 2) == 0 and counts[1] >= STEPS * 2 * math.prod(model.image[1:]) // 4


@pytest.mark.parametrize("name", ["resnet20", "small_cnn"])
def test_channels_last_images_give_the_same(name):
    model = make(name, neuron_options={"backend": "reference"}).double()
    images, found = images_for(model), []
    for how in (torch.contiguous_format, torch.channels_last):
        for weights in (torch.contiguous_format, torch.channels_last):
            x = images.to(memory_format=how).requires_grad_()
            logits = copy.deepcopy(model).to(memory_format=weights)(x)
            found.append((logits, torch.autograd.grad(logits.square().sum(), x)[0]))
    assert found[0][0].any()
    for logits, grad in found[1:]:
        assert_close("logits", logits, found[0][0], 1e-10)
        assert_close("gradient", grad, found[0][1], 1e-9 * (1 + found[0][1].abs().max().item()))


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_are_channels_last_on_a_cpu(channels):
    model, formats = make("small_cnn", image=(channels, 8, 8)), []
    for _, layer in model.spiking_layers():
        layer.register_forward_pre_hook(lambda module, args: formats.append(args[0][0].is_contiguous(memory_format=torch.channels_last)))
    model(images_for(model))
    assert formats == [True] * 3


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 1, 2, 2)], ids=str)
def test_pooling_equals_torch_and_saves_nothing(shape):
    x, saved = draw(*shape).double().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda value: value):
        y = HalfSize()(x)
    assert not saved
    assert_same_bits("pooled", y.detach(), F.avg_pool2d(x, 2).detach())
    assert torch.autograd.gradcheck(HalfSize(), x) and torch.autograd.gradgradcheck(HalfSize(), x)
    assert_close("vmap", torch.func.vmap(HalfSize())(x[None]), y[None], 0.0)


def test_what_is_saved_for_the_backward_pass():
    model = make("small_cnn", widths=(8, 16), image=(3, 16, 16), norm="bn")
    parameters = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    images = draw(64, 3, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        logits = model(images)
    first, pooled, second = 64 * 8 * 256, 64 * 8 * 64, 64 * 16 * 64
    # Per stage the convolution's input and its output, and the norm's; before the first spikes once, not T times.
    want = 4 * (images.numel() + 2 * first + STEPS * (pooled + 2 * second))
    assert want <= sum(saved.values()) <= 1.05 * want, (sum(saved.values()), want)
    assert logits.requires_grad


def block_by_hand(block: nn.Module, x: Tensor, shortcut_of_spikes: bool) -> Tensor:
    """The two blocks, written out for one step in eval mode with running statistics as made, and c = (0.3, 0.6)."""

    def norm(layer: nn.Module, x: Tensor) -> Tensor:
        return x / math.sqrt(1 + layer.eps) * getattr(layer, "alpha", 1.0)

    def spike(x: Tensor) -> Tensor:
        return (x >= 0.2).to(x.dtype)

    def conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, layer.weight, stride=layer.stride, padding=layer.weight.shape[-1] // 2)

    if shortcut_of_spikes:
        spikes = spike(norm(block.norm1, x))
        shortcut = x if block.shortcut is None else conv(block.shortcut, spikes)
        return 0.3 * shortcut + 0.6 * conv(block.conv2, spike(norm(block.norm2, conv(block.conv1, spikes))))
    branch = norm(block.norm2, conv(block.conv2, spike(norm(block.norm1, conv(block.conv1, x)))))
    shortcut = x if block.shortcut is None else norm(block.shortcut_norm, conv(block.shortcut, x))
    return spike(0.3 * shortcut + 0.6 * branch)


@pytest.mark.parametrize("kind", [PreActivation, Basic])
@pytest.mark.parametrize(("channels", "stride"), [(4, 1), (8, 1), (4, 2), (8, 2)])
def test_a_block_is_what_it_says(kind, channels, stride):
    torch.manual_seed(0)
    parts = Parts("wrn16_4", {**models.options.SHARED, "steps": 1, "neuron_options": {"threshold": 0.2}, "norm_options": {"threshold": 1.0}})
    block = kind(parts, 4, channels, stride).double().eval()
    assert [(name, value.tolist()) for name, value in block.named_parameters() if "combine" in name] == [("combine.weights", [0.5, 0.5])]
    assert isinstance(block.combine, models.Combine)
    block.combine.weights.data = torch.tensor([0.3, 0.6], dtype=torch.float64)
    x = 8 * draw(1, 2, 4, 6, 6).double()
    got = block(x, models.Pass())
    want = block_by_hand(block, x[0], kind is PreActivation)
    assert (block.shortcut is None) == (channels == 4 and stride == 1)
    assert got.any() and not (got == got.flatten()[0]).all()
    assert_close("block", got[0], want, 1e-12)


def test_alpha_of_tdbn_where_branches_meet():
    found = {name: module.alpha for name, module in make("resnet20").named_modules() if isinstance(module, NORMS["tdbn"])}
    meet = {name for name, alpha in found.items() if alpha == 1 / math.sqrt(2)}
    assert meet == {name for name in found if name.startswith("blocks") and name.endswith(("norm2", "shortcut_norm"))} and len(meet) == 11
    assert {found[name] for name in found if name not in meet} == {1.0}
    for name in ("wrn16_4", "small_cnn"):
        assert {module.alpha for module in make(name).modules() if isinstance(module, NORMS["tdbn"])} == {1.0}


def test_threshold_of_tdbn_is_that_of_the_neurons():
    def thresholds(**options) -> set:
        return {module.threshold for module in make("small_cnn", **options).modules() if isinstance(module, NORMS["tdbn"])}

    assert thresholds() == thresholds(neuron="relu") == {1.0}
    assert thresholds(neuron_options={"threshold": 0.5}) == thresholds(neuron=functools.partial(fastsnn.LIF, threshold=torch.tensor(0.5))) == {0.5}
    assert thresholds(neuron_options={"threshold": 0.5}, norm_options={"threshold": 2.0}) == {2.0}


def test_initial_values():
    model = make("vgg11_tiny", bias=True)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            want = math.sqrt(2 / (module.out_channels * 9))
            assert abs(module.weight.std().item() / want - 1) < 0.05 and abs(module.weight.mean().item()) < 5 * want / math.sqrt(module.weight.numel())
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            assert (module.bias == 0).all()
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 8


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shared", [False, True])
def test_twin(name, shared):
    model = make(name, normalise="cifar10", neuron_options={"threshold": 0.5})
    images = images_for(model)
    model(images).sum().backward()
    ann = models.twin(model, shared=shared)
    assert not ann.spiking_layers() and ann.steps == 1 and model.steps == STEPS and len(model.spiking_layers()) > 2
    ours, theirs = (dict([*net.named_parameters(), *net.named_buffers()]) for net in (model, ann))
    assert [*ours] == [*theirs] and [*model.state_dict()] == [*ann.state_dict()]
    for key, value in ours.items():
        if key != "readout_weights":
            assert torch.equal(value, theirs[key]) and (value is theirs[key]) == shared, key
    assert shared or all(value.grad is None for value in ann.parameters())
    model.eval(), ann.eval()
    before = ann(images)
    with torch.no_grad():
        model.classifier.weight.add_(1.0)
    assert torch.equal(ann(images), before) != shared
    rebuilt = models.build(**ann.spec)
    rebuilt.load_state_dict(ann.state_dict())
    assert rebuilt.spec == ann.spec and rebuilt.steps == 1
    assert_same_bits("rebuilt", rebuilt.eval()(images).detach(), ann(images).detach())
    assert model.spec["neuron"] == "if", "the twin changed the spec of its model"


def test_a_twin_is_the_network_with_relu():
    ann = models.twin(make("small_cnn", normalise="cifar10", norm="bn")).eval()
    images = images_for(ann)
    x = (images - torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)) / torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    for number, stage in enumerate((ann.features[0], ann.features[2], ann.features[4])):
        x = F.relu(F.conv2d(x, stage.conv.weight, stage.conv.bias, padding=1) / math.sqrt(1 + 1e-5))
        x = F.avg_pool2d(x, 2) if number < 2 else x.mean((2, 3))
    assert_close("logits", ann(images), F.linear(x, ann.classifier.weight, ann.classifier.bias), 1e-4)


@pytest.mark.parametrize("options", [{"norm": "tebn"}, {"norm": "bntt"}, {"encoding": "latency"}, {"encoding": "rsc", "readout": "membrane"}], ids=str)
def test_a_twin_keeps_steps_that_differ(options):
    model = make("small_cnn", **options)
    ann = models.twin(model).eval()
    images = images_for(model)
    assert ann.steps == STEPS and ann(images).shape == (4, 5)
    rebuilt = models.build(**ann.spec)
    rebuilt.load_state_dict(model.state_dict())
    for net in (ann, rebuilt.eval()):
        net.encoding.seed = 1
    assert_same_bits("rebuilt", rebuilt(images).detach(), ann(images).detach())


def test_an_ann_is_the_same_by_name_and_by_class():
    named, made = make("small_cnn", neuron="relu"), make("small_cnn", neuron=nn.ReLU)
    assert named.spec == made.spec and named.steps == 1
    images = images_for(named)
    assert_same_bits("logits", named(images).detach(), made(images).detach())


VARIANTS = {
    **{f"norm {norm}": {"norm": norm} for norm in NORMS},
    **{f"encoding {encoding}": {"encoding": encoding, "normalise": "cifar10"} for encoding in ENCODINGS},
    **{f"neuron {neuron}": {"neuron": neuron} for neuron in NEURONS},
    **{f"readout {readout}": {"readout": readout, "neuron": "lif"} for readout in models.READOUTS},
    "normalise": {"normalise": ((0.5, 0.4, 0.3), (0.2, 0.2, 0.2)), "image": [3, 8, 8]},
    "options": {
        "norm_options": {"eps": 1e-4},
        "neuron": "lif",
        "neuron_options": {"decay": 0.9, "surrogate": surrogates.Exponential(0.3, 1.0), "learn": ("decay", "threshold"), "fire": "gt", "detach_reset": True},
        "widths": (4, 8),
        "dropout": 0.1,
    },
    "rsc": {"encoding": "rsc", "encoding_options": {"sigma": 0.2}},
    "plif": {"neuron": "plif", "neuron_options": {"tau": 4.0, "surrogate": "atan:2.0"}},
    "noisy": {"neuron": "noisy", "neuron_options": {"sigma": 0.632, "decay": 0.5}},
    "a class": {"neuron": fastsnn.LIF, "neuron_options": {"decay": 0.8}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_spec_and_state_make_the_same_network(variant):
    model = make("small_cnn", **VARIANTS[variant])
    images = images_for(model, 8)
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("bias"):
                value.add_(1.0)  # so that something spikes
    model(images)  # moves the running statistics
    spec = json.loads(json.dumps(model.spec))
    assert spec == model.spec
    torch.manual_seed(1)
    other = models.build(**spec)
    assert other.spec == spec and repr(other) == repr(model)
    other.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    found = []
    for net in (model, other, copied):
        torch.manual_seed(2)
        found.append(net.eval()(images).detach())
    assert found[0].isfinite().all() and (found[0] != found[0][0, 0]).any()
    assert_same_bits("rebuilt", found[1], found[0])
    assert_same_bits("copied", found[2], found[0])
    with torch.no_grad():
        copied.classifier.weight.add_(1.0)
    torch.manual_seed(2)
    assert_same_bits("the original, after its copy changed", model(images).detach(), found[0])


@pytest.mark.parametrize("name", MODELS)
def test_spec_of_every_model(name):
    with torch.device("meta"):
        model = models.build(name)
        assert models.build(**model.spec).spec == model.spec == json.loads(json.dumps(model.spec))
    assert model.spec["name"] == name and set(model.spec) >= {"classes", "image", "steps", "norm", "encoding", "neuron", "normalise", "readout"}


@pytest.mark.parametrize(
    "options",
    [
        {"neuron": functools.partial(fastsnn.LIF, decay=0.9)},
        {"neuron_options": {"surrogate": surrogates.ATan(torch.tensor(2.0))}},
        {"neuron_options": {"threshold": torch.tensor(1.0)}},
    ],
    ids=["function", "tensor in a surrogate", "tensor"],
)
def test_no_spec_where_json_cannot_hold_it(options):
    model = make("small_cnn", **options)
    assert model.spec is None and models.twin(model).spec is None
    assert model(images_for(model)).shape == (4, 5)


def test_neuron_options_reach_the_layers():
    model = make("small_cnn", neuron="lif", neuron_options={"decay": 0.9, "threshold": 0.5, "reset": "soft", "surrogate": "exponential:0.3,2", "learn": ["threshold"]})
    for _, layer in model.spiking_layers():
        assert layer.decay == 0.9 and isinstance(layer.threshold, nn.Parameter) and layer.threshold.item() == 0.5
        assert layer.reset == "soft" and layer.surrogate == surrogates.Exponential(0.3, 2.0) and layer.steps == STEPS
    layers = make("small_cnn", neuron="plif", neuron_options={"tau": 4.0}).spiking_layers()
    assert all(abs(layer.w.sigmoid().item() - 0.25) < 1e-6 for _, layer in layers)
    assert all(layer.noise == 0.3 for _, layer in make("small_cnn", neuron="noisy", neuron_options={"sigma": 0.3}).spiking_layers())
    model = make("small_cnn", neuron=fastsnn.LIF, neuron_options={"decay": 0.7})
    assert model.spec["neuron"] == "lif" and all(layer.decay == 0.7 for _, layer in model.spiking_layers())


@pytest.mark.parametrize("name", surrogates.BY_NAME)
@pytest.mark.parametrize("relative", [False, True])
def test_surrogates_as_text(name, relative):
    kind = surrogates.BY_NAME[name]
    for values in ((), (0.1, 1 / 3)[: len(kind.parameters)]):
        surrogate = kind(*values, relative=relative)
        assert models.surrogate_from(models.surrogate_text(surrogate)) == surrogate
        assert models.surrogate_from(f"{name.replace('_', '-')}:{','.join(map(repr, values))}{',relative' * relative}") == surrogate


@pytest.mark.parametrize("neuron_options", [{"decay": 0.5}, {"tau": 2.0, "charge": "leak_state"}], ids=["decay", "tau"])
def test_readouts(neuron_options):
    currents, logits = [], {}
    for readout in models.READOUTS:
        model = make("small_cnn", neuron="lif", readout=readout, neuron_options={"threshold": 0.5, **neuron_options}, norm="bn")
        model.classifier.register_forward_hook(lambda module, args, out: currents.append(out.detach()))
        logits[readout] = model(images_for(model)).detach()
    x = currents[0]
    assert x.shape == (STEPS, 4, 5) and x[0].any() and not torch.equal(x[0], x[2]) and torch.equal(x, currents[2])
    assert_close("mean", logits["mean"], (x[0] + x[1] + x[2]) / 3, 1e-6)
    assert_close("sum", logits["sum"], x[0] + x[1] + x[2], 1e-6)
    v0, v1 = x[0], 0.5 * x[0] + x[1]
    assert_close("membrane", logits["membrane"], (v0 + v1 + (0.5 * v1 + x[2])) / 3, 1e-6)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.1)


@pytest.mark.parametrize(
    ("encoding", "options", "before", "after"),
    [("direct", {}, True, True), ("rsc", {"sigma": 0.3}, False, True), ("poisson", {"signed": True}, True, False)],
)
def test_where_images_are_normalised(encoding, options, before, after):
    model = make("small_cnn", encoding=encoding, encoding_options=options, normalise=(MEAN, STD))
    images = images_for(model)

    def scale(x: Tensor) -> Tensor:
        return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

    torch.manual_seed(3)
    got = model.encode(images)
    torch.manual_seed(3)
    encoded = model.encoding(scale(images) if before else images)
    want = encoded if before else scale(encoded)
    assert_close("encoded", got, want, 1e-5)
    assert got.shape[0] == (1 if encoding == "direct" else STEPS) and not torch.equal(got[0], images)
    assert "mean" not in "".join(model.state_dict()).replace("running_mean", "")


@pytest.mark.parametrize("encoding", ["poisson", "latency", "frequency"])
def test_encodings_that_take_pixels(encoding):
    assert make("small_cnn", encoding=encoding, normalise="cifar10").normalise is None
    with pytest.raises(ValueError, match=rf"encoding '{encoding}' takes pixels.*set normalise=None"):
        make("small_cnn", encoding=encoding, normalise=(MEAN, STD))


@pytest.mark.parametrize("name", [name for name, row in models.NORMALISATIONS.items() if row])
def test_normalisation_by_name(name):
    model = make("small_cnn", normalise=name)
    mean, std = models.NORMALISATIONS[name]
    image = torch.tensor(mean).view(1, 3, 1, 1) + 2 * torch.tensor(std).view(1, 3, 1, 1)
    assert_close("normalised", model.normalise(image.expand(1, 3, 8, 8)), torch.full((1, 3, 8, 8), 2.0), 1e-5)
    assert model.double().normalise.mean.dtype == torch.float64


def test_dropout_is_after_the_neurons_of_the_head():
    model = make("vgg11_tiny", dropout=0.2)
    layer, kept = model.head[0], []
    layer.register_forward_hook(lambda module, args, out: kept.append(out))
    x = 10 * torch.ones(STEPS, 2, 512)
    layer.linear.weight.data.fill_(1.0)
    for training in (True, False):
        layer.train(training)(x, models.Pass())
    assert kept[0].unique().tolist() == [0.0, 1.25] and abs((kept[0] == 0).float().mean().item() - 0.2) < 0.02
    assert (kept[1] == 1).all()


@pytest.mark.parametrize("name", ["resnet20", "small_cnn"])
def test_autocast(name):
    model = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, statistics = model(images_for(model), statistics=("mean",))
    assert logits.dtype == torch.float32 and statistics[0].mean.dtype == torch.float32
    logits.square().sum().backward()
    assert all(value.grad.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("image", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
def test_small_cnn_learns(image):
    """Two classes: bright stripes, across or down."""
    torch.manual_seed(0)
    model = models.small_cnn(image=image, classes=2, widths=(4, 8, 8), steps=2)
    labels = torch.arange(16) % 2
    images = 0.3 * draw(16, *image)
    images[labels == 0, :, ::2] += 0.6
    images[labels == 1, :, :, ::2] += 0.6
    optimiser = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(12):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
    assert (model(images).argmax(1) == labels).all() and loss < 0.3


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("vgg", {}, ValueError, ("models.build", "'vgg'", "wanted one of", "small_cnn", "Did you mean 'vgg1")),
        ("vgg11", {"step": 4}, TypeError, ("models.vgg11", "'step'", "Did you mean 'steps'?")),
        ("wrn16_4", {"dropout": 0.1}, TypeError, ("models.wrn16_4", "'dropout'")),
        ("vgg11", {"image": (3, 30, 30)}, ValueError, ("image is [3, 30, 30]", "divisible by 8", "Resize or pad")),
        ("vgg11_tiny", {"image": (3, 64, 40)}, ValueError, ("divisible by 16",)),
        ("vgg16", {"image": (3, 48, 48)}, ValueError, ("divisible by 32",)),
        ("small_cnn", {"image": (3, 6, 8)}, ValueError, ("divisible by 4",)),
        ("small_cnn", {"image": (32, 32)}, ValueError, ("image is (32, 32)", "(channels, height, width)")),
        ("small_cnn", {"image": (3, 32, 0)}, ValueError, ("three ints >= 1",)),
        ("small_cnn", {"widths": (8, 0)}, ValueError, ("widths is (8, 0)", "ints >= 1")),
        ("small_cnn", {"widths": ()}, ValueError, ("widths is ()",)),
        ("small_cnn", {"dropout": 1.0}, ValueError, ("dropout is 1.0", "[0, 1)")),
        ("small_cnn", {"classes": 0}, ValueError, ("classes is 0", "int >= 1")),
        ("small_cnn", {"steps": 2.0}, ValueError, ("steps is 2.0", "int >= 1")),
        ("small_cnn", {"norm": "tdnb"}, ValueError, ("norm 'tdnb'", "Did you mean 'tdbn'?")),
        ("small_cnn", {"norm_options": {"epsilon": 1e-5}}, ValueError, ("'epsilon'", "eps")),
        ("small_cnn", {"encoding": "poison"}, ValueError, ("encoding 'poison'", "Did you mean 'poisson'?")),
        ("small_cnn", {"neuron": "life"}, ValueError, ("neuron 'life'", "Did you mean 'lif'?")),
        ("small_cnn", {"neuron": 3}, TypeError, ("neuron is 3", "callable")),
        ("small_cnn", {"neuron": nn.ReLU()}, TypeError, ("neuron is ReLU()", "callable that makes a module")),
        ("small_cnn", {"neuron": functools.partial(fastsnn.LIF, steps=7)}, ValueError, ("steps=7", "Leave those to the network")),
        ("small_cnn", {"neuron": functools.partial(fastsnn.LIF, stateful=True)}, ValueError, ("stateful=True",)),
        ("small_cnn", {"neuron_options": {"decay": 0.9}}, TypeError, ("neuron 'if' has no option 'decay'",)),
        ("small_cnn", {"neuron": "relu", "neuron_options": {"decay": 0.9}}, TypeError, ("takes no options",)),
        ("small_cnn", {"neuron_options": {"treshold": 0.9}}, TypeError, ("Did you mean 'threshold'?",)),
        ("small_cnn", {"neuron_options": {"surrogate": "triangel:1"}}, ValueError, ("'triangel'", "Did you mean 'triangle'?")),
        ("small_cnn", {"neuron_options": {"surrogate": "atan:x"}}, ValueError, ("'atan:x'", "atan:alpha")),
        ("small_cnn", {"neuron_options": {"surrogate": "atan:1,2"}}, ValueError, ("at most 1 number",)),
        ("small_cnn", {"normalise": "cifar"}, ValueError, ("normalise 'cifar'", "Did you mean 'cifar10")),
        ("small_cnn", {"normalise": 0.5}, TypeError, ("normalise is 0.5", "(mean, std)")),
        ("small_cnn", {"normalise": ((0.5,), (0.5,))}, ValueError, ("1 means", "wanted 3 of each")),
        ("small_cnn", {"normalise": "cifar10", "image": (1, 8, 8)}, ValueError, ("3 means", "wanted 1 of each")),
        ("small_cnn", {"normalise": ((0.5,) * 3, (0.5, 0, 0.5))}, ValueError, ("above 0",)),
        ("small_cnn", {"readout": "max"}, ValueError, ("readout 'max'", "mean, sum, membrane")),
    ],
)
def test_errors_at_construction(name, options, error, words):
    with pytest.raises(error) as caught:
        models.build(name, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("images", "call", "error", "words"),
    [
        (draw(2, 3, 8, 10), {}, ValueError, ("models.small_cnn: images are [2, 3, 8, 10]", "wanted [N, 3, 8, 8]", "Resize")),
        (draw(2, 1, 8, 8), {}, ValueError, ("[2, 1, 8, 8]", "[N, 3, 8, 8]")),
        (draw(3, 8, 8), {}, ValueError, ("[3, 8, 8]",)),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, TypeError, ("images are uint8", "images.float() / 255")),
        ([[0.5]], {}, TypeError, ("images are list",)),
        (draw(2, 3, 8, 8), {"statistics": "mean"}, TypeError, ("('mean',)",)),
        (draw(2, 3, 8, 8), {"statistics": ("median",)}, ValueError, ("'median'",)),
    ],
)
def test_errors_at_forward(images, call, error, words):
    with pytest.raises(error) as caught:
        make("small_cnn")(images, **call)
    for word in words:
        assert word in str(caught.value)


def test_an_ann_has_no_statistics():
    with pytest.raises(ValueError, match="models.small_cnn: statistics are of spiking layers.*neuron='if'"):
        make("small_cnn", neuron="relu")(draw(2, 3, 8, 8), statistics=("mean",))
    with pytest.raises(TypeError, match="models.twin: model is a Linear"):
        models.twin(nn.Linear(2, 2))
