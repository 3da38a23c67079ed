"""TRADES, MART, SR and robust tuning against their formulas, by direct double forwards in plain PyTorch."""

import os
import subprocess
import sys
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import assert_same_bits
from fastsnn import LIF, distributed, models
from fastsnn.attacks.streams import Streams
from fastsnn.defenses import AT, MART, MPDSGR, REG, SR, TRADES, RobustTuning, boosted, divergence, gradient_sparsity, make_defense
from torch import Tensor, nn

STEPS, CLASSES, PLACES = 4, 4, torch.arange(10)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = draw(10, 2, 6, 6), PLACES % CLASSES


class Net(nn.Module):
    """Convolution, batch norm, IF, linear, leaky LIF with a soft reset and a learned threshold, linear."""

    def __init__(self, threshold: float = 0.6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.first = LIF(decay=1.0, steps=STEPS)
        self.hidden, self.out = nn.Linear(64, 7), nn.Linear(7, CLASSES)
        self.second = LIF(decay=0.8, threshold=threshold, reset="soft", learn=("threshold",))

    def forward(self, images: Tensor) -> Tensor:
        spikes = self.first(self.norm(self.conv(images))[None])
        return 3 * self.out(self.second(self.hidden(spikes.flatten(2)) * 3)).mean(0)


class Once(torch.autograd.Function):
    """A spike with the triangle surrogate that can be differentiated once."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return (z >= 0).to(z.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * (1 - ctx.saved_tensors[0].abs()).clamp(min=0)


def plain(net: Net, images: Tensor) -> Tensor:
    """The logits of `Net` in train mode as a loop over steps; none of fastsnn's code runs, and no buffer changes."""
    current = F.conv2d(images, net.conv.weight)
    mean, var = current.mean((0, 2, 3), keepdim=True), current.var((0, 2, 3), unbiased=False, keepdim=True)
    current = (current - mean) / (var + net.norm.eps).sqrt() * net.norm.weight[:, None, None] + net.norm.bias[:, None, None]
    v, w, logits = torch.zeros_like(current), torch.zeros(len(images), 7, dtype=images.dtype), 0.0
    for _ in range(STEPS):
        h = v + current
        s = Once.apply(h - 1.0)
        v = h * (1 - s)
        h = 0.8 * w + 3 * (s.flatten(1) @ net.hidden.weight.T + net.hidden.bias)
        s = Once.apply(h - net.second.threshold)
        w = h - net.second.threshold * s
        logits = logits + 3 * (s @ net.out.weight.T + net.out.bias) / STEPS
    return logits


class Looped(Net):
    """`Net` by the plain loop: what differentiates it twice meets an error."""

    def forward(self, images: Tensor) -> Tensor:
        return plain(self, images)


def softmax(z: Tensor) -> Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def of_label(p: Tensor) -> Tensor:
    return p[PLACES, Y]


def smooth_ce(p: Tensor, smoothing: float) -> Tensor:
    return -((1 - smoothing) * of_label(p).log() + smoothing * p.log().mean(1))


def best_other(values: Tensor) -> Tensor:
    """The largest value among the other classes, row by row."""
    return torch.stack([max(row[k] for k in range(CLASSES) if k != y) for row, y in zip(values, Y.tolist())])


# ---- the formulas, of logits on adversarial and on clean images ----------------------------------------------------------------


def trades(adversarial: Tensor, clean: Tensor, smoothing: float) -> Tensor:
    p, q = softmax(clean), softmax(adversarial)
    return smooth_ce(p, smoothing).mean() + 3.5 * kl(p, q).mean()


def mart(adversarial: Tensor, clean: Tensor, smoothing: float) -> Tensor:
    p, q = softmax(clean), softmax(adversarial)
    return (smooth_ce(q, smoothing) - (1.0001 - best_other(q) + 1e-12).log() + 2.5 * kl(p, q) * (1.0000001 - of_label(p))).mean()


def tuning(adversarial: Tensor, clean: Tensor, smoothing: float) -> Tensor:
    p, q = softmax(clean), softmax(adversarial)
    return smooth_ce(p, smoothing).mean() + 1.5 * kl(q, p).mean()


def tuning_as_coded(adversarial: Tensor, clean: Tensor, smoothing: float) -> Tensor:
    p, q = softmax(clean), softmax(adversarial)
    return smooth_ce(p, smoothing).mean() + 1.5 * kl(p, q).mean()


CASES = {
    "trades": (lambda **options: TRADES(weight=3.5, **options), trades),
    "trades uniform": (lambda **options: TRADES(weight=3.5, start="uniform", **options), trades),
    "mart": (lambda **options: MART(weight=2.5, **options), mart),
    "tuning": (lambda **options: RobustTuning(beta=1.5, **options), tuning),
    "tuning as coded": (lambda **options: RobustTuning(beta=1.5, direction="clean-adversarial", **options), tuning_as_coded),
}
every_case = pytest.mark.parametrize("case", CASES)


def assert_same_gradients(net: nn.Module, found: Tensor, wanted: Tensor, wanted_net: nn.Module | None = None) -> None:
    names, parameters = zip(*net.named_parameters())
    others = parameters if wanted_net is None else tuple(wanted_net.parameters())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for name, got, expected in zip(names, torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, others), strict=True):
        assert expected.abs().max() > 1e-6, f"{name}: a test without a gradient tests nothing"
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")


@every_case
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradients_by_a_double_forward(case, smoothing):
    make, formula = CASES[case]
    net, defense = Net().double(), make(eps=0.2, seed=3)
    found = defense.batch(net, X, Y, 1.0)
    adversarial, clean = plain(net, found), plain(net, X)
    assert (kl(softmax(clean), softmax(adversarial)) > 1e-3).sum() >= 5, "a pair without a difference tests nothing"
    outcome = defense.step(net, X, Y, progress=1.0, smoothing=smoothing)
    torch.testing.assert_close(outcome.logits, adversarial.detach(), rtol=1e-11, atol=1e-12)
    assert outcome.terms["clean_accuracy"].item() == (clean.argmax(1) == Y).double().mean().item()
    assert_same_gradients(net, outcome.loss, formula(adversarial, clean, smoothing))


@every_case
def test_both_forwards_run_in_train_mode_the_adversarial_one_first(case):
    net, defense = Net().double(), CASES[case][0](eps=0.2, seed=3)
    found, mean = defense.batch(net, X, Y, 1.0), torch.zeros(4, dtype=torch.float64)
    assert net.training and net.norm.num_batches_tracked == 0, "crafting runs in eval mode"
    calls = []
    defense.step(net, X, Y, progress=1.0, forward=lambda images: calls.append(images) or net(images))
    for images in (found, X):
        mean = 0.9 * mean + 0.1 * F.conv2d(images, net.conv.weight).mean((0, 2, 3)).detach()
    torch.testing.assert_close(net.norm.running_mean, mean, rtol=1e-12, atol=1e-14)
    assert len(calls) == 2 and torch.equal(calls[0], found) and torch.equal(calls[1], X), "what trains is the forward that was passed"


@every_case
def test_no_second_derivative_is_taken(case):
    outcome = CASES[case][0](eps=0.2, seed=3).step(Looped().double(), X, Y)
    outcome.loss.backward()
    assert outcome.terms["kl"] > 0


def test_the_divergence_is_that_of_wide_logits():
    z, w = torch.tensor([[300.0, 0.0, -300.0]]), torch.tensor([[0.0, 200.0, -300.0]])
    assert divergence(z, w).item() == pytest.approx(200.0) and divergence(z, w, "adversarial-clean").item() == pytest.approx(300.0)
    assert divergence(z.half(), w.half()).dtype == torch.float32 and divergence(z, z).item() == 0
    assert boosted(z, torch.tensor([0])).item() == pytest.approx(-torch.tensor(1.0001, dtype=torch.float64).log().item(), rel=1e-3)


# ---- the images --------------------------------------------------------------------------------------------------------------


def smooth_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, CLASSES)).double()


def plain_pgd(net, start: Tensor, eps: float, steps: int, step_size: float, loss) -> Tensor:
    x = start
    for _ in range(steps):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(net(x)), x)
        x = (X + (x + step_size * gradient.sign() - X).clamp(-eps, eps)).clamp(0, 1)
    return x.detach()


@pytest.mark.parametrize("start", ["normal", "uniform"])
@pytest.mark.parametrize("what", [TRADES, MART])
@pytest.mark.parametrize("step_size", [None, 0.02])
def test_pgd_of_a_loss_against_a_plain_loop(what, start, step_size):
    net, eps, steps = smooth_net(), 0.05, 4
    net(X)  # running statistics that are not those of the batch
    found = what(eps=eps, steps=steps, step_size=step_size, start=start, seed=5).batch(net, X, Y, 1.0)
    net.eval()
    clean, streams = softmax(net(X)).detach(), Streams(5, PLACES)
    noise = 0.001 * streams.normal(2, 6, 6, dtype=torch.float64) if start == "normal" else eps * (2 * streams.uniform(2, 6, 6, dtype=torch.float64) - 1)
    raised = (lambda z: kl(clean, softmax(z)).sum()) if what is TRADES else (lambda z: -of_label(softmax(z)).log().sum())
    want = plain_pgd(net, (X + noise).clamp(0, 1), eps, steps, step_size or 2.5 * eps / steps, raised)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)
    assert (found - X).abs().max() > 0.9 * eps


@pytest.mark.parametrize("direction", ["adversarial-clean", "clean-adversarial"])
@pytest.mark.parametrize("share", [0.5, 0.2])
def test_rfgsm_on_the_divergence_against_plain_steps(direction, share):
    net, eps = smooth_net(), 0.05
    net(X)
    found = RobustTuning(eps=eps, alpha_share=share, direction=direction, seed=5).batch(net, X, Y, 1.0)
    net.eval()
    clean = softmax(net(X)).detach()
    x = (X + share * eps * Streams(5, PLACES).signs(2, 6, 6, dtype=torch.float64)).clamp(0, 1).requires_grad_()
    q = softmax(net(x))
    (gradient,) = torch.autograd.grad((kl(q, clean) if direction == "adversarial-clean" else kl(clean, q)).sum(), x)
    torch.testing.assert_close(found, (x.detach() + (1 - share) * eps * gradient.sign()).clamp(0, 1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("what", [TRADES, MART])
def test_the_radius_warms_up(what):
    net = smooth_net()
    defense = what(eps=0.1, steps=5, warmup=0.5, seed=0)
    largest = [(defense.batch(net, X, Y, progress) - X).abs().max().item() for progress in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert largest == pytest.approx([0.0, 0.02, 0.05, 0.1, 0.1], abs=1e-12)
    assert_same_bits("half way", defense.batch(net, X, Y, 0.25), what(eps=0.05, steps=5, seed=0).batch(net, X, Y, 0.25))


# ---- SR ----------------------------------------------------------------------------------------------------------------------


def quotient(net, x: Tensor, h: float, forward=plain) -> tuple[Tensor, Tensor, Tensor]:
    """(p(x + h*d) - p(x))/h by two forwards, the logits at x, and p's gradient there."""
    x = x.clone().requires_grad_()
    logits = forward(net, x)
    other = logits.argmax(1) == Y
    rivals = torch.where(other, logits.scatter(1, Y[:, None], -1e9).argmax(1), logits.argmax(1))

    def p(z: Tensor) -> Tensor:
        return of_label(z).exp() / (of_label(z).exp() + z[PLACES, rivals].exp())

    (gradient,) = torch.autograd.grad(p(logits).sum(), x, retain_graph=True)
    return (p(forward(net, x.detach() + h * gradient.sign())) - p(logits)) / h, logits, gradient


@pytest.mark.parametrize("h", [0.01, 0.3])
@pytest.mark.parametrize("adversarial", [False, True])
def test_sr_by_a_double_forward(h, adversarial):
    net, defense, x = Net().double(), SR(weight=0.2, h=h), X
    if adversarial:
        defense = AT(eps=0.2, steps=3, step_size=0.1, seed=1) + defense
        x = defense.parts[0].attack(net, X, Y)
    slope, logits, gradient = quotient(net, x, h)
    assert slope.abs().max() > 0.1
    outcome = defense.step(net, X, Y)
    assert outcome.terms["sr"].item() == pytest.approx(0.2 * slope.square().mean().item(), rel=1e-10)
    assert outcome.terms["gradient_l1"].item() == pytest.approx(gradient.abs().sum((1, 2, 3)).mean().item(), rel=1e-10)
    assert_same_gradients(net, outcome.loss, F.cross_entropy(logits, Y) + 0.2 * slope.square().mean())
    assert net.norm.num_batches_tracked == 2, "both forwards run in train mode"


def test_srs_quotient_is_the_l1_norm_of_a_smooth_network():
    """In train mode images meet in batch norm, and the mean of the quotients is the mean of the norms."""
    net, l1 = smooth_net(), []
    for training in (True, False):
        net.train(training)
        slope, _, gradient = quotient(net, X, 1e-6, forward=lambda net, x: net(x))
        l1.append(gradient.abs().sum((1, 2, 3)))
        assert slope.mean().item() == pytest.approx(l1[-1].mean().item(), rel=1e-4)
    torch.testing.assert_close(slope, l1[-1], rtol=1e-4, atol=1e-8)
    outcome = SR(weight=1.0, h=1e-6).step(net, X, Y)
    assert outcome.terms["sr"].item() == pytest.approx(l1[-1].square().mean().item(), rel=1e-4)


def test_sr_differentiates_the_squared_l1_norm_of_a_smooth_network():
    """Its parameters' gradient without a second derivative against the one that double backward gives."""
    net = smooth_net().eval()
    x = X.clone().requires_grad_()
    logits = net(x)
    rivals = logits.detach().scatter(1, Y[:, None], -1e9).argmax(1)
    p = of_label(logits).exp() / (of_label(logits).exp() + logits[PLACES, rivals].exp())
    (gradient,) = torch.autograd.grad(p.sum(), x, create_graph=True)
    parameters = tuple(net.parameters())
    want = torch.autograd.grad(gradient.abs().sum((1, 2, 3)).square().mean(), parameters, allow_unused=True)
    losses = [SR(weight=weight, h=1e-6).loss(net, X, Y) for weight in (1.0, 0.0)]
    for got, expected in zip(torch.autograd.grad(losses[0] - losses[1], parameters), want):
        expected = torch.zeros_like(got) if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * max(value.abs().max().item() for value in want if value is not None))


def test_sr_takes_no_second_derivative(monkeypatch):
    net, calls, grad = Looped().double(), [], torch.autograd.grad

    def once(*arguments, create_graph=False, **options):
        assert not create_graph
        return grad(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", once)
        outcome = SR(weight=1.0, h=0.3).step(net, X, Y, forward=lambda images: calls.append(images) or net(images))
    assert len(calls) == 2, "what trains is the forward that was passed"
    assert outcome.terms["sr"] > 0 and not calls[1].requires_grad
    outcome.loss.backward()
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradient_sparsity():
    class Weighted(nn.Module):
        def __init__(self, weights: list[float]) -> None:
            super().__init__()
            self.weights, self.norm = nn.Parameter(torch.tensor(weights, dtype=torch.float64)), nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            z = (x * self.weights).sum(1)
            return torch.stack([z, torch.zeros_like(z)], 1)

    x = torch.full((3, 4), 0.5, dtype=torch.float64)
    for weights, sparseness in (([1, -1, 1, 1], 0.0), ([0, 0, -2, 0], 1.0), ([0, 0, 0, 0], 1.0), ([3, 4, 0, 0], 2 - 7 / 5)):
        model = Weighted(weights).train()
        p = torch.sigmoid(torch.tensor(0.5 * sum(weights))).item()
        found, l1 = gradient_sparsity(model, x, torch.zeros(3, dtype=torch.int64))
        assert found.tolist() == pytest.approx([sparseness] * 3, abs=1e-12)
        assert l1.tolist() == pytest.approx([p * (1 - p) * sum(map(abs, weights))] * 3, rel=1e-6)
        assert model.training and model.weights.requires_grad and model.weights.grad is None


# ---- thresholds, sums, random networks, errors -------------------------------------------------------------------------------


def test_robust_tuning_keeps_learned_thresholds_up():
    net = Net(threshold=0.5)
    fixed, weight = net.first.threshold, net.hidden.weight.detach().clone()
    for value, kept in ((0.01, 0.03), (-1.0, 0.03), (0.4, 0.4)):
        with torch.no_grad():
            net.second.threshold.fill_(value)
        RobustTuning().after_step(net)
        assert net.second.threshold.item() == pytest.approx(kept)
    RobustTuning(least=0.5).after_step(net)
    assert net.second.threshold.item() == 0.5 and net.first.threshold == fixed and torch.equal(net.hidden.weight, weight)
    assert RobustTuning(seed=0).step(net, X.float(), Y).terms["least_threshold"].item() == 0.5


@every_case
def test_other_defenses_see_the_adversarial_batch(case):
    defense = CASES[case][0](eps=0.2, seed=3)
    found = defense.batch(Net().double(), X, Y, 1.0)
    omega, clean = (MPDSGR().step(Net().double(), images, Y).terms["omega"].item() for images in (found, X))
    assert abs(omega - clean) > 1e-3
    alone = defense.step(Net().double(), X, Y, progress=1.0).loss.item()
    for total in (defense + MPDSGR(0.7), MPDSGR(0.7) + REG() + defense):
        outcome = total.step(Net().double(), X, Y, progress=1.0)
        assert outcome.terms["omega"].item() == pytest.approx(omega, rel=1e-9)
        assert outcome.loss.item() == pytest.approx(alone + 0.7 * omega, rel=1e-9)


def test_sums_that_are_not_defined():
    undefined = {"trades+at": "trades and at each make adversarial images", "trades+mart": "replace the task loss", "robust-tuning+at": "each make"}
    for names, words in undefined.items():
        with pytest.raises(ValueError, match=words):
            make_defense(names)
    assert "sr" in (TRADES(eps=0.2, seed=1) + SR(0.1)).step(Net().double(), X, Y).terms


def test_random_networks():
    torch.manual_seed(0)
    noisy = models.small_cnn(image=(2, 6, 6), classes=CLASSES, steps=2, widths=(4,), neuron="noisy")
    with pytest.raises(ValueError, match="SR: the network is random.*neuron='if'"):
        SR().prepare(noisy)
    with pytest.raises(ValueError, match="SR: the network is random"):
        SR().prepare(models.small_cnn(image=(2, 6, 6), classes=CLASSES, steps=2, widths=(4,), neuron="noisy", neuron_options={"inference": "plain"}))
    SR().prepare(models.small_cnn(image=(2, 6, 6), classes=CLASSES, steps=2, widths=(4,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for defense in (TRADES(steps=2, eot=2), MART(steps=2), RobustTuning(eot=2)):
            defense.step(noisy, X.float(), Y).loss.backward()


BAD = {
    "weight": (lambda: TRADES(weight=-1), "TRADES: weight is -1"),
    "start": (lambda: MART(start="gaussian"), "MART: start 'gaussian' is unknown; wanted one of normal, uniform"),
    "eps": (lambda: MART(eps=8), "Divide by 255"),
    "warmup": (lambda: TRADES(warmup=2), r"warmup is 2; wanted a number in \[0, 1\]"),
    "steps": (lambda: TRADES(steps=0), "steps is 0"),
    "direction": (lambda: RobustTuning(direction="clean-adv"), "Did you mean 'clean-adversarial'"),
    "alpha": (lambda: RobustTuning(alpha_share=1.5), "alpha_share is 1.5"),
    "least": (lambda: RobustTuning(least=-0.1), "least is -0.1"),
    "h": (lambda: SR(h=0), "h is 0; wanted the step"),
    "sr": (lambda: SR(weight=float("nan")), "SR: weight is nan"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options(what):
    call, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        call()


# ---- several processes -------------------------------------------------------------------------------------------------------

PAIRED = ("trades", "mart", "sr", "robust-tuning+mpd-sgr")


def gradients(rank: int | None) -> dict[str, dict[str, Tensor]]:
    """Each defense's gradients on the whole batch in one process, or of half of it under DistributedDataParallel; pairs are given, not crafted."""
    rows = slice(None) if rank is None else slice(5 * rank, 5 * rank + 5)
    found = {}
    for names in PAIRED:
        torch.manual_seed(0)
        model = models.small_cnn(image=(2, 6, 6), classes=CLASSES, steps=2, widths=(4,), norm="bn").double()
        wrapped = model if rank is None else nn.parallel.DistributedDataParallel(distributed.synchronise(model))
        defense = make_defense(names, {"sr": {"weight": 0.5, "h": 0.2}} if names == "sr" else None)
        if names != "sr":
            defense.batch = lambda model, images, labels, progress: (images + 0.3 * (draw(*X.shape, seed=7)[rows] - 0.5)).clamp(0, 1)
        defense.step(model, X[rows], Y[rows], forward=wrapped).loss.backward()
        found[names] = {name: value.grad for name, value in model.named_parameters()}
    return found


def joined(rank: int, folder: str) -> dict[str, dict[str, Tensor]]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    try:
        return gradients(rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    wanted = gradients(None)
    other = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    try:
        found = joined(0, tmp_path)
        errors = other.communicate(timeout=120)[1]
    finally:
        other.kill()
    assert other.returncode == 0, errors
    for names in PAIRED:
        assert max(value.abs().max() for value in wanted[names].values()) > 1e-3
        for name, value in wanted[names].items():
            torch.testing.assert_close(found[names][name], value, rtol=1e-9, atol=1e-11, msg=lambda text: f"{names}, {name}: {text}")


if __name__ == "__main__":
    joined(1, sys.argv[1])
