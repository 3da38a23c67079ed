"""Normalisations, against their formulas written out in float64 and against PyTorch's batch norm."""

import copy
import pickle

import pytest
import torch
from fastsnn import norm
from fastsnn.norm import BNTT, NORMS, TDBN, TEBN, BatchNorm, make_norm
from torch import Tensor, nn

STEPS, CHANNELS = 4, 3
SHAPE = (STEPS, 5, CHANNELS, 2, 3)
#: Every normalisation that learns something.
LEARNED = [name for name in NORMS if name != "none"]
every_norm = pytest.mark.parametrize("name", NORMS)
every_learned_norm = pytest.mark.parametrize("name", LEARNED)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, **options) -> nn.Module:
    """A normalisation in float64 with parameters and running statistics that are no defaults."""
    layer = make_norm(name, CHANNELS, STEPS, **options).double()
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(1 + 0.3 * draw(*parameter.shape, seed=10 + n))
        for n, buffer in enumerate(layer.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(draw(*buffer.shape, seed=20 + n).abs() + 0.5)
    return layer


def plain(name: str, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, unbiased variance) of a training batch x [T, N, C, H, W], by the formulas."""
    dims = (1, 3, 4) if name == "bntt" else (0, 1, 3, 4)
    n = x.numel() // x.shape[2] // (x.shape[0] if name == "bntt" else 1)
    mean = x.sum(dims, keepdim=True) / n
    var = (x - mean).pow(2).sum(dims, keepdim=True) / n
    y = (x - mean) / (var + layer.eps).sqrt()
    if name == "tdbn":
        y = layer.alpha * layer.threshold * y
    y = layer.weight.view(-1, 1, CHANNELS, 1, 1) * y + layer.bias.view(-1, 1, CHANNELS, 1, 1)
    if name == "tebn":
        y = layer.p.view(STEPS, 1, 1, 1, 1) * y
    shape = layer.running_mean.shape
    return y, mean.reshape(shape).detach(), (var * n / (n - 1)).reshape(shape).detach()


def assert_near(what: str, found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, wanted {list(wanted.shape)}"
    error = (found - wanted).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: error {error:.2e}"


def gradients(y: Tensor, x: Tensor, layer: nn.Module, weight: Tensor) -> dict[str, Tensor]:
    names = ["x", *(name for name, _ in layer.named_parameters())]
    return dict(zip(names, torch.autograd.grad(y, [x, *layer.parameters()], weight)))


@every_learned_norm
@pytest.mark.parametrize("options", [{}, {"momentum": 0.3, "eps": 1e-2}], ids=["defaults", "options"])
def test_training_is_the_formula(name, options):
    layer = make(name, **options, **({"threshold": 0.7, "alpha": 0.5} if name == "tdbn" else {}))
    before = {key: value.clone() for key, value in layer.named_buffers()}
    x = (3 + 2 * draw(*SHAPE)).requires_grad_()
    weight = draw(*SHAPE, seed=1)
    wanted, mean, var = plain(name, layer, x)
    wanted_gradients = gradients(wanted, x, layer, weight)
    y = layer(x)
    assert_near("y", y, wanted)
    for key, value in gradients(y, x, layer, weight).items():
        assert_near(f"gradient of {key}", value, wanted_gradients[key])
    momentum = options.get("momentum", 0.1)
    assert_near("running mean", layer.running_mean, (1 - momentum) * before["running_mean"] + momentum * mean)
    assert_near("running variance", layer.running_var, (1 - momentum) * before["running_var"] + momentum * var)
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


@every_norm
def test_evaluation_uses_and_keeps_the_running_statistics(name):
    layer = make(name).eval()
    before = {key: value.clone() for key, value in layer.named_buffers()}
    x = draw(*SHAPE)
    y = layer(x)
    if name == "none":
        assert torch.equal(y, x)
        return
    column = (-1, 1, CHANNELS, 1, 1)
    wanted = (x - layer.running_mean.view(column)) / (layer.running_var + layer.eps).sqrt().view(column)
    wanted = wanted * layer.weight.view(column) + layer.bias.view(column)
    assert_near("y", y, wanted * layer.p.view(STEPS, 1, 1, 1, 1) if name == "tebn" else wanted)
    assert all(torch.equal(value, before[key]) for key, value in layer.named_buffers())
    batch = layer.train()(x)
    assert not torch.allclose(batch, y), "training took the running statistics"
    assert not torch.equal(layer.running_mean, before["running_mean"])


@every_norm
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_constant_current_equals_repeated_input(name, training):
    layer, repeated = make(name).train(training), make(name).train(training)
    x = draw(1, *SHAPE[1:]).requires_grad_()
    weight = draw(*SHAPE, seed=1)
    y = layer(x)
    wanted = repeated(x.expand(STEPS, *SHAPE[1:]))
    assert y.shape[0] == (STEPS if name in ("tebn", "bntt") else 1)
    assert_near("y", y.expand(wanted.shape), wanted)
    found, wanted = gradients(y.expand(SHAPE), x, layer, weight), gradients(wanted, x, repeated, weight)
    for key, value in found.items():
        assert_near(f"gradient of {key}", value, wanted[key])
    for key, value in layer.named_buffers():
        assert_near(key, value.double(), repeated.get_buffer(key).double())


def test_merged_batch_norm_is_torchs():
    ours, torchs = BatchNorm(CHANNELS), nn.BatchNorm2d(CHANNELS)
    x = draw(*SHAPE).float()
    for _ in range(3):
        assert torch.equal(norm.merge(ours(x)), torchs(norm.merge(x)))
    assert [(key, value.dtype) for key, value in ours.state_dict().items()] == [(key, value.dtype) for key, value in torchs.state_dict().items()]
    assert all(torch.equal(value, torchs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_bntt_is_one_batch_norm_for_each_step():
    layer = BNTT(CHANNELS, STEPS)
    torchs = [nn.BatchNorm2d(CHANNELS, eps=1e-4) for _ in range(STEPS)]
    x = draw(*SHAPE).float()
    for training in (True, True, False):
        y = layer.train(training)(x)
        for t, one in enumerate(torchs):
            assert torch.equal(y[t], one.train(training)(x[t]))
            assert torch.equal(layer.running_mean[t], one.running_mean) and torch.equal(layer.running_var[t], one.running_var)


@pytest.mark.parametrize("affine", [True, False])
def test_tdbn_scales_by_alpha_and_threshold(affine):
    threshold, alpha = 0.8, 2**-0.5
    layer = TDBN(CHANNELS, threshold, alpha, affine=affine).double()
    x = 5 + 3 * draw(8, 16, CHANNELS, 6, 6)
    y = layer(x)
    assert_near("deviation", y.std((0, 1, 3, 4), correction=0), torch.full((CHANNELS,), threshold * alpha, dtype=torch.float64), 1e-5)
    assert_near("y", y, BatchNorm(CHANNELS).double()(x) * threshold * alpha)
    layer.eval(), layer.reset_running_stats()
    assert_near("eval", layer(x), x * threshold * alpha, 1e-5)
    assert torch.equal(TDBN(CHANNELS).double()(x), BatchNorm(CHANNELS).double()(x))


def test_tebn_multiplies_each_step_by_p():
    layer = TEBN(CHANNELS, STEPS).double()
    x = draw(*SHAPE)
    unscaled = layer(x)
    assert torch.equal(layer.p, torch.ones(STEPS, dtype=torch.float64)) and torch.equal(unscaled, BatchNorm(CHANNELS).double()(x))
    with torch.no_grad():
        layer.p.copy_(torch.arange(STEPS))
    y = layer(x)
    for t in range(STEPS):
        assert torch.equal(y[t], t * unscaled[t])
    layer.reset_parameters()
    assert torch.equal(layer.p, torch.ones(STEPS, dtype=torch.float64)) and layer.num_batches_tracked == 0


@every_learned_norm
def test_without_parameters(name):
    layer = make_norm(name, CHANNELS, STEPS, affine=False)
    assert [key for key, _ in layer.named_parameters()] == ["p"] * (name == "tebn")
    x = draw(*SHAPE).float()
    assert torch.equal(layer(x), make_norm(name, CHANNELS, STEPS)(x))


def test_bntt_without_bias():
    layer = BNTT(CHANNELS, STEPS, bias=False)
    assert [name for name, _ in layer.named_parameters()] == ["weight"] and layer.weight.shape == (STEPS, CHANNELS)
    x = draw(*SHAPE).float()
    assert torch.equal(layer(x), BNTT(CHANNELS, STEPS)(x))


@every_norm
@pytest.mark.parametrize("leading", [1, STEPS])
def test_channels_last_stays(name, leading):
    x = norm.split(draw(leading * 2, CHANNELS, 4, 5).float().contiguous(memory_format=torch.channels_last), leading)
    y = make_norm(name, CHANNELS, STEPS)(x)
    assert_near("y", y, make_norm(name, CHANNELS, STEPS)(x.contiguous()), 1e-6)
    assert norm.merge(y).is_contiguous(memory_format=torch.channels_last)


@every_norm
def test_linear_signals(name):
    """[T, N, C] without space, as after a linear layer."""
    x = draw(STEPS, 6, CHANNELS)
    assert_near("y", make(name)(x), make(name)(x[..., None, None])[..., 0, 0])


@every_norm
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("leading", [1, STEPS])
def test_bfloat16_as_torchs_batch_norm(name, autocast, leading):
    x = draw(leading, *SHAPE[1:]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, torchs = make_norm(name, CHANNELS, STEPS)(x), nn.BatchNorm2d(CHANNELS)(norm.merge(x))
    assert y.dtype == torchs.dtype
    wanted = make_norm(name, CHANNELS, STEPS).double()(x.double())
    assert (y - wanted).abs().max() <= 2**-8 * wanted.abs().max()


@every_norm
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_whole(name, training):
    layer, compiled = make(name).train(training), make(name).train(training)
    x = draw(*SHAPE)
    assert_near("y", torch.compile(compiled, backend="eager", fullgraph=True)(x), layer(x))
    assert all(torch.equal(value, layer.get_buffer(key)) for key, value in compiled.named_buffers())


@every_norm
def test_copies_and_state(name):
    layer = make(name)
    x = draw(*SHAPE)
    layer(x)
    fresh = make_norm(name, CHANNELS, STEPS).double()
    fresh.load_state_dict(layer.state_dict())
    wanted = layer.eval()(x)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.eval()(x), wanted)
        assert name == "none" or other.group is None


def test_merge_and_split():
    x = draw(*SHAPE)
    merged = norm.merge(x)
    assert merged.shape == (SHAPE[0] * SHAPE[1], *SHAPE[2:]) and merged.data_ptr() == x.data_ptr()
    assert torch.equal(merged[SHAPE[1]], x[1, 0]), "time does not come first"
    back = norm.split(merged, STEPS)
    assert torch.equal(back, x) and back.data_ptr() == x.data_ptr()


X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    "call, words",
    {
        "channels of x": (lambda: BatchNorm(7)(X), ["BatchNorm", "[4, 5, 3, 2, 3]", "channels = 7", "norm.split"]),
        "merged x": (lambda: BatchNorm(3, 4)(X[0, :, :, 0, 0]), ["BatchNorm", "[5, 3]", "[T, N, C, *S]"]),
        "no step": (lambda: BatchNorm(3)(X[:0]), ["BatchNorm", "[0, 5, 3, 2, 3]"]),
        "steps of x": (lambda: TDBN(3, steps=6)(X), ["TDBN", "4 steps", "wanted 6", "constant"]),
        "one value": (lambda: BatchNorm(3, 4)(X[:1, :1, :, :1, :1]), ["BatchNorm", "one value per channel", "[1, 3, 1, 1]", "eval()"]),
        "one value per step": (lambda: BNTT(3, 4)(X[:, :1, :, :1, :1]), ["BNTT", "one value per channel", "[1, 3, 1, 1]"]),
        "channels": (lambda: BatchNorm(0), ["BatchNorm", "channels", "0", "int >= 1"]),
        "steps": (lambda: BatchNorm(3, 2.0), ["BatchNorm", "steps", "2.0", "int >= 1"]),
        "steps of TEBN": (lambda: TEBN(3, None), ["TEBN", "steps is None"]),
        "steps of BNTT": (lambda: BNTT(3, None), ["BNTT", "steps is None"]),
        "momentum": (lambda: BatchNorm(3, momentum=None), ["BatchNorm", "momentum", "None", "[0, 1]"]),
        "eps": (lambda: BatchNorm(3, eps=0.0), ["BatchNorm", "eps", "0.0"]),
        "threshold": (lambda: TDBN(3, threshold=0.0), ["TDBN", "threshold", "0.0"]),
        "alpha": (lambda: TDBN(3, alpha="half"), ["TDBN", "alpha", "half"]),
        "norm": (lambda: make_norm("tdbm", 3, 4), ["make_norm", "'tdbm'", "bntt", "Did you mean 'tdbn'?"]),
        "option": (lambda: make_norm("tdbn", 3, 4, alpa=1), ["make_norm", "'alpa'", "threshold", "Did you mean 'alpha'?"]),
        "split": (lambda: norm.split(X[0], 4), ["split", "[5, 3, 2, 3]", "steps = 4"]),
        "split by zero": (lambda: norm.split(X[0], 0), ["split", "steps is 0"]),
        "merge": (lambda: norm.merge(torch.zeros(3)), ["merge", "[3]", "[T, N, ...]"]),
    }.values(),
)
def test_errors_say_what_is_wrong(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_options_of_none_are_swallowed():
    assert make_norm("none", 3, 4, threshold=1.0, momentum=7)(X) is X


def test_text_names_what_differs():
    assert repr(make_norm("tdbn", 3, 4, alpha=0.5)) == "TDBN(3, steps=4, eps=1e-05, momentum=0.1, threshold=1, alpha=0.5)"
