"""Two processes over gloo, against one process that has the whole batch."""

import copy
import os
import pickle
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import fastsnn
import pytest
import torch
import torch.distributed as dist
from fastsnn import distributed
from fastsnn.norm import NORMS, TDBN, BatchNorm, make_norm
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, CHANNELS, BATCH = 3, 4, 6
SYNCHRONISED = [name for name in NORMS if name != "none"]
#: How many samples of the batch the first of the two processes gets.
SHARES = {"equal": 3, "unequal": 2}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share_of(x: Tensor, first: int, rank: int | None, dim: int = 1) -> Tensor:
    """The samples of one rank; None: all."""
    return x if rank is None else x.narrow(dim, 0 if rank == 0 else first, first if rank == 0 else x.shape[dim] - first)


def normalise(name: str, leading: int, first: int, rank: int | None) -> dict[str, Tensor]:
    """Outputs, gradients and running statistics of one normalisation, in training."""
    layer = make_norm(name, CHANNELS, STEPS).double()
    for n, parameter in enumerate(layer.parameters()):
        parameter.data = 1 + 0.3 * draw(*parameter.shape, seed=10 + n)
    if rank is not None:
        distributed.synchronise(layer)
    x = share_of(3 + 2 * draw(leading, BATCH, CHANNELS, 2, 3), first, rank).clone().requires_grad_()
    weight = share_of(draw(STEPS, BATCH, CHANNELS, 2, 3, seed=1), first, rank)
    y = layer(x)
    (y.square() * weight).sum().backward()
    return {
        "y": y.detach(),
        "gradient of x": x.grad,
        **{f"gradient of {key}": parameter.grad for key, parameter in layer.named_parameters()},
        **{key: buffer.double() for key, buffer in layer.named_buffers()},
    }


def pool(rank: int | None, first: int) -> dict[str, Tensor]:
    """Mean and variance of all samples, and the gradients of a function of both."""
    x = share_of(5 + draw(2, BATCH, CHANNELS), first, rank).clone().requires_grad_()
    var, mean = torch.var_mean(x, 1, correction=0)
    if rank is not None:
        mean, var = distributed.moments(mean, var, count=None if first == BATCH // 2 else x.shape[1])
    # Each rank adds its own half of the loss: together they are the loss of one process.
    ((draw(2, CHANNELS, seed=2) * mean * var.sqrt()).sum() / (1 if rank is None else 2)).backward()
    return {"mean": mean.detach(), "var": var.detach(), "gradient of x": x.grad}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.norm, self.fire, self.head = nn.Conv2d(2, CHANNELS, 3), TDBN(CHANNELS, steps=STEPS), fastsnn.LIF(steps=STEPS), nn.Linear(CHANNELS, 5)

    def forward(self, images: Tensor):
        spikes, statistics = self.fire(self.norm(self.conv(images)[None]), statistics=("mean", "var"))
        return self.head(spikes.mean((0, 3, 4))), statistics


def train(rank: int | None) -> dict[str, Tensor]:
    """Gradients of a spiking network's parameters under a loss of logits and of the moments of membranes."""
    model = Small().double()
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(distributed.synchronise(model))
    images, labels = draw(BATCH, 2, 6, 6), torch.arange(BATCH) % 5
    logits, statistics = wrapped(share_of(images, BATCH // 2, rank, 0))
    mean, var = distributed.moments(statistics.mean, statistics.var)
    loss = F.cross_entropy(logits, share_of(labels, BATCH // 2, rank, 0)) + (mean / (var + 1e-5).sqrt()).square().mean()
    loss.backward()
    return {"mean": mean.detach(), "var": var.detach(), **{f"gradient of {key}": parameter.grad for key, parameter in model.named_parameters()}}


def far_from_zero(rank: int | None) -> Tensor:
    """float32 with means a thousand deviations from zero."""
    layer = BatchNorm(CHANNELS)
    if rank is not None:
        distributed.synchronise(layer)
    return layer(share_of(1000 + draw(STEPS, BATCH, CHANNELS, 8, 8), BATCH // 2, rank).float()).detach()


def answer_as_one_of_two() -> dict:
    """What one of two processes finds; runs in a process of its own."""
    before = distributed.world()
    started = distributed.start("cpu")
    rank = started[0]
    found = {"world before start": before, "start": started, "again": distributed.start("cpu"), "is_main": distributed.is_main(), "ranks": distributed.ranks()}
    found["backend"] = dist.get_backend()
    for name in SYNCHRONISED:
        for leading in (1, STEPS):
            for share, first in SHARES.items():
                found[name, leading, share] = normalise(name, leading, first, rank)
    for share, first in SHARES.items():
        found["moments", share] = pool(rank, first)
    found["training"] = train(rank)
    found["far"] = far_from_zero(rank)

    x = draw(3, 2, seed=rank).t()
    x = (x if rank == 0 else x.contiguous()).requires_grad_()  # the layout in memory is each rank's own matter
    total = distributed.all_reduce(x)
    (total.square() * (rank + 1)).sum().backward()
    found["all_reduce"] = {"sum": total.detach(), "gradient": x.grad}
    second, = torch.autograd.grad(torch.autograd.grad(distributed.all_reduce(x).pow(3).sum(), x, create_graph=True)[0].sum(), x)  # fmt: skip
    found["second derivative"] = second

    same = torch.tensor([1.0, float("nan"), -0.0])
    found["same"] = distributed.same_everywhere(same), distributed.same_everywhere(same + rank), distributed.same_everywhere(torch.tensor(rank))
    whole = make_norm("bntt", CHANNELS, STEPS)
    distributed.synchronise(whole)
    found["copies"] = copy.deepcopy(whole).group is whole.group, pickle.loads(pickle.dumps(whole)).group is None
    found["text"] = repr(whole)
    single = distributed.synchronise(make_norm("bn", CHANNELS), [dist.new_group([r]) for r in range(2)][rank])
    x = draw(1, 2, CHANNELS, seed=rank).float()
    found["own group"] = torch.equal(single(x), BatchNorm(CHANNELS)(x))
    low = distributed.synchronise(BatchNorm(CHANNELS))
    found["bfloat16"] = low(draw(STEPS, 2, CHANNELS, seed=rank).bfloat16()).detach()
    still = distributed.synchronise(BatchNorm(CHANNELS)).eval()
    found["eval"] = still(x) if rank == 0 else still.running_mean  # one rank alone: evaluation waits for nobody
    foreign = []
    for model in (nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.SyncBatchNorm(3))):
        try:
            foreign.append(distributed.synchronise(model) is model)
        except ValueError as error:
            foreign.append(str(error))
    found["foreign"] = foreign
    distributed.finish()
    found["finished"] = not dist.is_initialized()
    return found


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[dict]:
    """What two processes find that are started as torchrun starts them: with its variables, and a store held here."""
    folder = tmp_path_factory.mktemp("ranks")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder / f"{rank}.pt")],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def assert_near(what: str, found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)}, wanted {list(wanted.shape)}"
    error = (found - wanted).abs().max().item()
    assert error <= tolerance * max(1.0, wanted.abs().max().item()), f"{what}: error {error:.2e}"


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("leading", [1, STEPS], ids=["constant", "stepped"])
@pytest.mark.parametrize("name", SYNCHRONISED)
def test_norms_over_two_processes_equal_one_with_the_whole_batch(answers, name, leading, share):
    wanted = normalise(name, leading, SHARES[share], None)
    found = [answer[name, leading, share] for answer in answers]
    for key, value in wanted.items():
        if key in ("y", "gradient of x"):
            assert_near(key, torch.cat([f[key] for f in found], 1), value)
        elif key.startswith("gradient"):
            assert_near(key, found[0][key] + found[1][key], value)
        else:
            assert torch.equal(found[0][key], found[1][key]), f"{key} differs between ranks"
            assert_near(key, found[0][key], value)


@pytest.mark.parametrize("share", SHARES)
def test_moments_over_two_processes_equal_those_of_all_samples(answers, share):
    wanted = pool(None, SHARES[share])
    found = [answer["moments", share] for answer in answers]
    for key in ("mean", "var"):
        assert torch.equal(found[0][key], found[1][key])
        assert_near(key, found[0][key], wanted[key])
    assert_near("gradient", torch.cat([f["gradient of x"] for f in found], 1), wanted["gradient of x"])


def test_a_network_under_ddp_has_the_gradients_of_one_process(answers):
    wanted = train(None)
    assert wanted["gradient of conv.weight"].abs().max() > 1e-3
    for key, value in wanted.items():
        assert torch.equal(answers[0]["training"][key], answers[1]["training"][key])
        assert_near(key, answers[0]["training"][key], value)


def test_all_reduce_and_its_gradients(answers):
    x = [draw(3, 2, seed=rank).t() for rank in range(2)]
    for answer in answers:
        assert torch.equal(answer["all_reduce"]["sum"], x[0] + x[1])
        assert_near("gradient", answer["all_reduce"]["gradient"], 2 * (x[0] + x[1]) * (1 + 2))
        # Both ranks' cubes count, in each derivative: d2/dx2 of 2*s**3, over two ranks that each ask.
        assert_near("second derivative", answer["second derivative"], 2 * 2 * 6 * (x[0] + x[1]))


def test_means_far_from_zero_cost_no_digits(answers):
    x = (1000 + draw(STEPS, BATCH, CHANNELS, 8, 8)).float().double()  # as the layers get it
    wanted = BatchNorm(CHANNELS).double()(x).detach()
    single = (far_from_zero(None) - wanted).abs().max()
    found = (torch.cat([answer["far"] for answer in answers], 1) - wanted).abs().max()
    assert found <= max(2 * single, 1000 * 2**-24), f"error {found:.2e}; of one process {single:.2e}"


def test_the_world_of_two_processes(answers):
    for rank, answer in enumerate(answers):
        assert answer["world before start"] == answer["start"] == answer["again"] == (rank, 2, rank)
        assert answer["is_main"] == (rank == 0) and answer["ranks"] == 2 and answer["backend"] == "gloo" and answer["finished"]


def test_same_everywhere_compares_bits(answers):
    assert all(answer["same"] == (True, False, False) for answer in answers)


def test_groups_of_layers(answers):
    for answer in answers:
        assert answer["copies"] == (True, True) and "ranks=2" in answer["text"]
        assert answer["own group"], "a group of one is not this process alone"
        assert answer["bfloat16"].dtype == torch.bfloat16
        assert "BatchNorm1d" in answer["foreign"][0] and "convert_sync_batchnorm" in answer["foreign"][0] and answer["foreign"][1] is True
    x = draw(1, 2, CHANNELS).float()
    assert torch.equal(answers[0]["eval"], BatchNorm(CHANNELS).eval()(x))
    low = torch.cat([draw(STEPS, 2, CHANNELS, seed=rank).bfloat16() for rank in range(2)], 1)
    wanted = BatchNorm(CHANNELS).double()(low.double())
    assert (torch.cat([answer["bfloat16"] for answer in answers], 1) - wanted).abs().max() <= 2**-8 * wanted.abs().max()


# ---- one process -------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_alone(alone):
    assert distributed.start("cpu") == distributed.world() == (0, 1, 0) and distributed.is_main() and distributed.ranks() == 1
    assert not dist.is_initialized()
    x, var = draw(3).requires_grad_(), draw(3).abs()
    assert distributed.all_reduce(x) is x and distributed.same_everywhere(x)
    mean, same = distributed.moments(x, var)
    assert mean is x and same is var
    distributed.finish()


@pytest.fixture
def pretended(alone):
    """A second process that is not there and adds nothing to any sum."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SYNCHRONISED)
def test_synchronised_norms_compile_whole(pretended, name):
    layer = distributed.synchronise(make_norm(name, CHANNELS, STEPS).double())
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    found = []
    for call in (layer, compiled):
        x = draw(STEPS, 2, CHANNELS).requires_grad_()
        y = call(x)
        found.append((y.detach(), torch.autograd.grad(y.square().sum() + y.pow(3).sum(), x)[0]))
    assert_near("y", found[1][0], found[0][0])
    assert_near("gradient of x", found[1][1], found[0][1])
    assert distributed.ranks(layer.group) == 2 and (found[0][1].abs() > 1e-3).any()


def test_errors(alone, monkeypatch):
    with pytest.raises(RuntimeError, match=r"synchronise: no process group.*start\(\)"):
        distributed.synchronise(BatchNorm(3))
    with pytest.raises(ValueError, match=r"moments: mean is torch.float64 \[3\] and var is torch.float64 \[2\]; wanted one"):
        distributed.moments(draw(3), draw(2))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "99", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.world() == (1, 2, 99) and not distributed.is_main()
    with pytest.raises(RuntimeError, match="start: rank 99 on this machine has no GPU.*nproc-per-node=gpu"):
        distributed.start("cuda")
    with pytest.raises(ValueError, match="start: device is 'meta'; wanted cpu or cuda"):
        distributed.start("meta")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(answer_as_one_of_two(), Path(sys.argv[1]))
