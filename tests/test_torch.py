"""The operator inside PyTorch: compile, func, autocast, checkpointing, double backward, fakes."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fastsnn
import pytest
import torch
import torch._dynamo.testing
from conftest import GPU
from fastsnn import cuda, ops, surrogates
from fastsnn.problem import Problem
from torch.utils.checkpoint import checkpoint

DEVICE = "cuda" if GPU else "cpu"


def current(*shape: int, seed: int = 0, **options) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw).to(DEVICE).to(**options).requires_grad_()


def gradient(out: torch.Tensor, x: torch.Tensor, **options) -> torch.Tensor:
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape)
    return torch.autograd.grad(out, x, weight, **options)[0]


@pytest.mark.parametrize("form", ["plain", "statistics", "channels_last", "bfloat16", "neuron_wise"])
def test_opcheck(form):
    x = current(3, 2, 4, 5, 5)
    decay = threshold = None
    if form == "bfloat16":
        x = x.detach().bfloat16().requires_grad_()
    if form == "channels_last":
        x = x.detach().permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).requires_grad_()
    if form == "neuron_wise":
        threshold = torch.rand(3, 100, device=DEVICE) + 0.5
        decay = torch.rand(1, 4, device=DEVICE)
    dynamics = (3, "leak", "ge", "hard", 0.0, False, 0.0, 0, 0.5, 1.0, 0.2, 2, "auto")
    forward = torch.ops.fastsnn.lif_forward
    args = (x.detach(), None, decay, threshold, None, None, *dynamics, True, 15 if form == "statistics" else 0, False)
    torch.library.opcheck(forward, args, test_utils=("test_schema", "test_faketensor"))
    spikes, v, _, states, table = forward(*args)
    back = (torch.ones_like(spikes), torch.ones_like(v), None, None, x.detach(), None, decay, threshold, None, None, states, table)
    torch.library.opcheck(
        torch.ops.fastsnn.lif_backward,
        (*back, None, None, torch.zeros(1, dtype=torch.int64), *dynamics, "triangle", 1.0, 1.0, False, 0, 0, [True, False, True, True, False]),
        test_utils=("test_schema", "test_faketensor"),
    )


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.lif = fastsnn.LIF(decay=0.7, learn=("threshold", "decay"), steps=4, merged=True)
        self.head = torch.nn.Linear(4, 5)
        self.out = fastsnn.ParametricLIF(steps=4, merged=True)

    def forward(self, x):
        s = self.lif(self.conv(x))
        return self.out(self.head(s.mean((2, 3)))).unflatten(0, (4, -1)).mean(0)


def build_net() -> Net:
    torch.manual_seed(0)
    return Net().to(DEVICE)


def test_compile_full_graph_equals_eager():
    net, x = build_net(), current(8, 3, 6, 6)
    compiled = torch.compile(net, fullgraph=True)
    want, got = net(x), compiled(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    leaves = [x, *net.parameters()]
    weight = torch.randn_like(want)
    want = torch.autograd.grad(want, leaves, weight)
    got = torch.autograd.grad(got, leaves, weight)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_functional_with_statistics_and_noise(dynamic):
    def run(x, seed):
        out = fastsnn.lif(x, decay=0.8, fire="gaussian", noise=0.3, seed=seed, statistics=("mean", "var", "rate"), keep=("membrane",))
        return out.spikes, out.v, out.membrane, out.statistics.mean, out.statistics.var, out.statistics.rate

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x, seed = current(5, batch, 3, 4), torch.tensor([11], device=DEVICE)
        want, got = run(x, seed), compiled(x, seed)
        for a, b in zip(got, want):
            assert torch.equal(a, b)
        total = [sum((i + 1) * (o * o).sum() for i, o in enumerate(outs)) for outs in (want, got)]
        torch.testing.assert_close(gradient(total[1], x), gradient(total[0], x), rtol=1e-5, atol=1e-5)


def test_adjoint_reaches_compiled_graphs():
    x = current(4, 2, 3)
    compiled = torch.compile(lambda x: fastsnn.lif(x).spikes, fullgraph=True)
    out = compiled(x)
    default = gradient(out, x, retain_graph=True)
    with fastsnn.adjoint(surrogates.Exponential(0.3, 1.0)):
        late = gradient(out, x, retain_graph=True)
    with fastsnn.adjoint("bptr"):
        straight = gradient(out, x, retain_graph=True)
    eager = fastsnn.lif(x).spikes
    with fastsnn.adjoint(surrogates.Exponential(0.3, 1.0)):
        assert torch.equal(late, gradient(eager, x, retain_graph=True))
    with fastsnn.adjoint("bptr"):
        assert torch.equal(straight, gradient(eager, x))
    assert not torch.equal(default, late) and not torch.equal(default, straight)


def test_adjoint_reaches_other_threads():
    x = current(4, 2, 3)
    out, found = fastsnn.lif(x).spikes, []
    with fastsnn.adjoint("spatial"):
        thread = threading.Thread(target=lambda: found.append(gradient(out, x, retain_graph=True)))
        thread.start()
        thread.join()
        assert torch.equal(found[0], gradient(out, x, retain_graph=True))
    assert not torch.equal(found[0], gradient(out, x))


def test_func_grad_equals_autograd():
    x = current(4, 2, 3)

    def loss(x):
        return (fastsnn.lif(x, decay=0.9, statistics=("var",)).spikes * torch.arange(24.0, device=DEVICE).reshape(4, 2, 3)).sum()

    want = torch.autograd.grad(loss(x), x)[0]
    assert torch.equal(torch.func.grad(loss)(x.detach()), want)
    value, vjp = torch.func.vjp(lambda x: fastsnn.lif(x, decay=0.9).spikes, x.detach())
    assert torch.equal(vjp(torch.arange(24.0, device=DEVICE).reshape(4, 2, 3))[0], want)
    assert torch.equal(value, fastsnn.lif(x, decay=0.9).spikes)


def test_vmap_equals_a_loop():
    xs, thresholds = current(3, 4, 2, 5).detach(), torch.rand(3, 5, device=DEVICE) + 0.5

    def run(x, threshold):
        out = fastsnn.lif(x, threshold=threshold, statistics=("mean",))
        return out.spikes, out.v, out.statistics.mean

    for got, want in zip(torch.vmap(run)(xs, thresholds), zip(*(run(x, t) for x, t in zip(xs, thresholds)))):
        assert torch.equal(got, torch.stack(want))
    got = torch.vmap(run, in_dims=(1, None))(xs.movedim(0, 1), thresholds[0])
    assert torch.equal(got[0], torch.stack([run(x, thresholds[0])[0] for x in xs]))


def test_per_sample_gradients():
    xs, threshold = current(6, 4, 1, 5).detach(), torch.rand(5, device=DEVICE) + 0.5

    def loss(threshold, x):
        return (fastsnn.lif(x, threshold=threshold).v ** 2).sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(threshold, xs)
    for i, x in enumerate(xs):
        want = torch.func.grad(loss, argnums=(0, 1))(threshold, x)
        torch.testing.assert_close(got[0][i], want[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(got[1][i], want[1])


def test_create_graph_works_and_a_second_derivative_names_the_cure():
    x = current(4, 2, 3)
    out = fastsnn.lif(x).spikes
    first = gradient(out, x, create_graph=True)
    assert torch.equal(first, gradient(fastsnn.lif(x).spikes, x))
    with pytest.raises(RuntimeError, match="backend='reference'"):
        first.square().sum().backward()


def test_second_derivative_of_the_reference():
    x = current(4, 2, 3)
    out = fastsnn.lif(x, surrogate=surrogates.ATan(2.0), backend="reference").spikes
    first = gradient(out, x, create_graph=True)
    assert gradient(first.square().sum(), x).abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_noise(reentrant):
    x, layer, weight, found = current(4, 2, 30), fastsnn.NoisyLIF(0.5), torch.randn(4, 2, 30, device=DEVICE), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        x.grad = None
        (run(x) * weight).sum().backward()
        found.append(x.grad)
    assert torch.equal(*found) and found[0].any()


def test_checkpointing_at_every_call():
    """The first call of a kind, which makes a plan, saves the same tensors as the later ones: without that, checkpointing objects."""
    layer = torch.nn.Sequential(torch.nn.Linear(5, 5), fastsnn.LIF()).to(DEVICE)
    for batch in (2, 3, 2):
        x = current(4, batch, 3, 5)
        found = [torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)[0] for _ in range(2)]
        want = torch.autograd.grad(layer(x).sum(), x)[0]
        assert all(torch.equal(gradient, want) for gradient in found)


@pytest.mark.parametrize("bring_back", [torch.Tensor.contiguous, lambda t: t.clone(memory_format=torch.channels_last_3d)], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("alone", [True, False], ids=["this tensor", "all saved"])
def test_a_saved_input_that_comes_back_in_another_layout(bring_back, alone):
    """The strides of the forward pass count for nothing then; a plan that believed in them read past the end."""
    x = torch.randn(400, 2, 3, 6, 8, device=DEVICE)[::100].requires_grad_()
    weight = torch.randn(4, 2, 3, 6, 8, device=DEVICE)

    def back(saved):
        return bring_back(saved) if saved.dim() == 5 else saved

    def gradient(hooked: bool):
        with torch.autograd.graph.saved_tensors_hooks(back, lambda t: t) if hooked and not alone else contextlib.nullcontext():
            spikes = fastsnn.lif(x).spikes
        if hooked and alone:
            spikes.grad_fn._raw_saved_tensors[0].register_hooks(back, lambda t: t)
        return torch.autograd.grad(spikes, x, weight)[0]

    want = torch.autograd.grad(fastsnn.lif(x, backend="reference").spikes, x, weight)[0]
    for hooked in (False, True, True, False, True, False):
        torch.testing.assert_close(gradient(hooked), want)


def test_batched_gradients_and_a_negated_view():
    x = current(4, 2, 3)
    weights = torch.randn(5, 4, 2, 3, device=DEVICE)
    for _ in range(3):
        spikes = fastsnn.lif(x).spikes
        got = torch.autograd.grad(spikes, x, weights, is_grads_batched=True, retain_graph=True)[0]
        want = torch.stack([torch.autograd.grad(spikes, x, weight, retain_graph=True)[0] for weight in weights])
        torch.testing.assert_close(got, want)
    view = torch.randn(4, 3, 3, dtype=torch.complex64, device=DEVICE).conj().imag
    assert view.is_neg()
    for _ in range(3):
        assert torch.equal(fastsnn.lif(view).v, fastsnn.lif(view.clone()).v)


def test_one_compiled_graph_serves_many_layers():
    """Blocks compiled one by one: as many as torch allows graphs of one function, and more."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layers = [fastsnn.LIF().to(DEVICE) for _ in range(12)]
    x, seen = current(4, 2, 3, 5), []
    outs = [torch.compile(layer, fullgraph=True, backend=counter)(x) for layer in layers]

    def rule(layer, mean, var):
        seen.append(layers.index(layer))
        return surrogates.Triangle(1.0 + len(seen))

    with fastsnn.adjoint(rule):
        for out in outs:
            out.sum().backward()
    assert counter.frame_count == 1 and seen == list(range(12))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(backend, grad):
    x = current(4, 2, 3).detach()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="forward-mode derivative.*Use reverse mode"):
        torch.func.jvp(lambda x: fastsnn.lif(x, backend=backend).v, (x,), (torch.ones_like(x),))


def test_the_reference_under_transforms():
    """The cure that a second derivative names works within torch.func too."""

    def loss(x, backend="reference"):
        return (fastsnn.lif(x, decay=0.9, backend=backend).v ** 2).sum()

    x = current(4, 2, 3).detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(lambda x: loss(x, "auto"))(x))
    twice = torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(x)
    y = x.clone().requires_grad_()
    want = torch.autograd.grad(torch.autograd.grad(loss(y), y, create_graph=True)[0].sum(), y)[0]
    torch.testing.assert_close(twice, want)
    assert want.any()
    stacked = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(stacked), torch.stack([torch.func.grad(loss)(one) for one in stacked]))


def test_a_transform_inside_a_compiled_function():
    """torch returns zeros for it where it is traced; so it is not."""

    def gradient(x):
        return torch.func.grad(lambda x: fastsnn.lif(x).v.sum())(x)

    x = current(4, 2, 3).detach()
    assert gradient(x).any()
    torch.testing.assert_close(torch.compile(gradient, backend="aot_eager")(x), gradient(x))


def test_compiled_gradient_of_the_state_beside_a_surrogate_per_neuron():
    surrogate = surrogates.ATan(torch.rand(1, 5, 3, device=DEVICE) + 1)
    x, state = torch.randn(4, 5, 7, 3, device=DEVICE).transpose(1, 2), current(7, 5, 3)
    weight = torch.randn(7, 5, 3, device=DEVICE)

    def run(state):
        return fastsnn.lif(x, state * 2, surrogate=surrogate).v

    want = torch.autograd.grad(run(state), state, weight)[0]
    torch.testing.assert_close(torch.autograd.grad(torch.compile(run, fullgraph=True)(state), state, weight)[0], want)


def test_noise_is_fresh_unless_seeded():
    x = current(4, 2, 200)
    layer = fastsnn.NoisyLIF(0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.seed = 5
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    if DEVICE == "cpu" and dtype == torch.float16 and not torch.amp.is_autocast_available("cpu"):
        pytest.fail("autocast is not available on this CPU")
    layer, linear = fastsnn.LIF(), torch.nn.Linear(6, 5, device=DEVICE)
    x = current(4, 3, 6)
    with torch.autocast(DEVICE, dtype):
        hidden = linear(x)
        spikes, v = layer(hidden, return_state=True)
        loss = spikes.sum() + v.sum()
    assert hidden.dtype == spikes.dtype == dtype and v.dtype == torch.float32
    want, state = fastsnn.LIF(backend="reference")(hidden, return_state=True)
    assert torch.equal(spikes, want) and torch.equal(v, state)
    loss.backward()
    assert linear.weight.grad.isfinite().all()


def test_no_gradient_is_kept_in_inference_mode():
    x = current(40, 2, 3).detach()
    with torch.inference_mode():
        out = fastsnn.lif(x)
    assert not out.spikes.requires_grad
    config_free = fastsnn.lif(x)
    assert not config_free.spikes.requires_grad and torch.equal(config_free.spikes, out.spikes)


def test_saved_for_backward_is_x_and_little_more():
    x = current(8, 4, 16, 8, 8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        fastsnn.lif(x, statistics=("mean", "var"))
    assert sorted(sizes)[-1] == x.numel() and sum(sizes) <= x.numel() + 4 * 8 * 16


def test_pickled_operator_survives_a_fresh_process(tmp_path):
    net = build_net().cpu()
    path = tmp_path / "net.pt"
    torch.save(net.state_dict(), path)
    code = (
        "import sys, torch, fastsnn\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_torch import Net\n"
        f"net = Net(); net.load_state_dict(torch.load({str(path)!r}))\n"
        "print(float(net(torch.ones(8, 3, 6, 6)).sum()))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(fastsnn.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(float(net(torch.ones(8, 3, 6, 6)).sum()), abs=1e-5)


def test_reference_serves_the_operators_where_no_kernel_can(monkeypatch):
    """What a compiled graph runs on a machine without kernels."""
    x = current(4, 2, 3, 5)
    dynamics = (4, "leak", "ge", "hard", 0.0, False, 0.0, 0, 0.5, 1.0, 0.0, -1, "reference")
    spikes, v, *_ = torch.ops.fastsnn.lif_forward(x.detach(), None, None, None, None, None, *dynamics, False, 0, True)
    want = fastsnn.lif(x, backend="reference")
    assert torch.equal(spikes, want.spikes) and torch.equal(v, want.v)
    grads = torch.ops.fastsnn.lif_backward(
        torch.ones_like(spikes), None, None, None, x.detach(), None, None, None, None, None,
        torch.empty(0), torch.empty(0), None, None, None, *dynamics, "triangle", 1.0, 1.0, False, 0, 0, [True] + [False] * 4,
    )  # fmt: skip
    assert torch.equal(grads[0], torch.autograd.grad(want.spikes.sum(), x)[0])


@pytest.mark.skipif(not GPU, reason="streams and graphs exist on GPUs only")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_cuda_graph_keeps_the_adjoint_of_its_capture(name):
    x, weight = current(4, 8, 64), torch.randn(4, 8, 64, device="cuda")

    def step():
        return torch.autograd.grad(fastsnn.lif(x, backend=name).spikes, x, weight)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with fastsnn.adjoint("bptr"):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, want)


@pytest.mark.skipif(not GPU, reason="contexts exist on GPUs only")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_thread_that_has_not_used_the_gpu(name):
    x = current(4, 8, 64)
    want = fastsnn.lif(x, backend=name).spikes  # compiled, and its memory kept by torch's allocator
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(fastsnn.lif(x, backend=name).spikes))
    thread.start()
    thread.join()
    assert torch.equal(found[0], want)


@pytest.mark.parametrize(("context", "calls"), [(0, ["setDevice 1", "launchKernel"]), (7, ["launchKernel"])])
def test_nvrtc_binds_the_context_of_the_device(monkeypatch, context, calls):
    """Against a stand-in for CuPy: the driver's launch wants a context, which a new thread does not have."""
    seen: list[str] = []
    kernels = object.__new__(cuda.NVRTC)
    kernels._driver = SimpleNamespace(ctxGetCurrent=lambda: context, launchKernel=lambda *_: seen.append("launchKernel"))
    kernels._runtime = SimpleNamespace(setDevice=lambda device: seen.append(f"setDevice {device}"))
    monkeypatch.setattr(kernels, "_kernel", lambda name: 1)
    monkeypatch.setattr(cuda, "kernel_name", lambda tiles, call: "forward")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    kernels.launch(cuda.Tiles(), None, Problem(), 0)
    assert seen == calls


def test_nvrtc_that_cannot_be_loaded_is_a_reason(monkeypatch):
    """CuPy without CUDA's compiler library: `auto` must know before it counts on it."""

    def missing():
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    here = SimpleNamespace(driver=None, function=None, runtime=None, nvrtc=SimpleNamespace(getVersion=missing))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=here))
    monkeypatch.setitem(sys.modules, "cupy.cuda", here)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "Library", lambda path: (_ for _ in ()).throw(OSError("no such library")))
    reason = cuda.CUDA().missing()
    assert reason is not None and "libnvrtc.so.13: cannot open" in reason


def test_config_matches_the_schema():
    assert ops.Config._fields[: ops._SHARED] == (
        "steps", "charge", "fire", "reset", "v_reset", "detach_reset", "noise", "first_step",
        "decay_value", "threshold_value", "delta", "power", "backend",
    )  # fmt: skip
