"""Several processes as one: sums and moments over all ranks, with gradients, and the group's start and end.

Losses are summed over ranks by the backward pass: a gradient that arrives at a shared value is the sum of what every rank
sends back, as in `DistributedDataParallel`, which then divides by the number of ranks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["all_reduce", "finish", "is_main", "moments", "ranks", "same_everywhere", "start", "synchronise", "world"]


def ranks(group: dist.ProcessGroup | None = None) -> int:
    """How many processes a group holds; None: all of them. 1 where nothing was started."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


def all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, `y = sum over r of x_r`, on every rank; its gradient is summed over ranks too.

    tensor: any shape and dtype that the group's backend takes, the same on every rank. group: None means all ranks.
    One process: the tensor itself.
    """
    return tensor if ranks(group) == 1 else _Sum.apply(tensor, group)


def moments(mean: Tensor, var: Tensor, group: dist.ProcessGroup | None = None, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the elements of all ranks, from those of each rank; differentiable.

        mean = sum over r of w_r*mean_r;   var = sum over r of w_r*(var_r + (mean_r - mean)**2)

    mean, var: float, of one shape, the same on every rank; var is biased. count: how many elements stand behind this
    rank's moments, w_r = count_r / sum of counts; None: equally many on every rank, w_r = 1 / ranks.
    One process: mean and var themselves. Every rank gets the same bits.

    >>> mean, var = moments(torch.zeros(4, 64), torch.ones(4, 64))
    """
    if mean.shape != var.shape or mean.dtype != var.dtype:
        raise ValueError(
            f"moments: mean is {mean.dtype} {list(mean.shape)} and var is {var.dtype} {list(var.shape)}; wanted one dtype and shape. "
            "Pass the moments of the same statistics."
        )
    return (mean, var) if ranks(group) == 1 else pooled(mean, var, group, 1 if count is None else count)[:2]


def pooled(mean: Tensor, var: Tensor, group: dist.ProcessGroup | None, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `moments` returns, and the sum of the counts, [] like mean; for two ranks or more."""
    # Each rank writes its own row and zeros elsewhere: the sum is exact, and one collective carries everything.
    shape, rank = mean.shape, dist.get_rank(group)
    own = torch.cat([mean.reshape(-1), var.reshape(-1), mean.new_full((1,), count)])
    rows = all_reduce(torch.stack([own if r == rank else torch.zeros_like(own) for r in range(ranks(group))]), group)
    means, variances, counts = rows[:, : mean.numel()], rows[:, mean.numel() : -1], rows[:, -1:].detach()
    total = counts.sum()
    weights = counts / total
    # Relative to the first rank's mean, so that means far from zero cost no digits.
    centre = means[0].detach()
    all_mean = centre + (weights * (means - centre)).sum(0)
    all_var = (weights * (variances + (means - all_mean).square())).sum(0)
    return all_mean.view(shape), all_var.view(shape), total


def same_everywhere(tensor: Tensor, group: dist.ProcessGroup | None = None) -> bool:
    """Whether every rank holds the same bits. tensor: of one shape and dtype on all ranks, which all must call this."""
    if ranks(group) == 1:
        return True
    own = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    first = own.clone()
    dist.broadcast(first, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    differs = (first != own).any().int().reshape(1)
    dist.all_reduce(differs, op=dist.ReduceOp.MAX, group=group)
    return not differs.item()


def synchronise(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Let every normalisation of `fastsnn.norm` in the model take its batch statistics over all ranks of a group.

    group: None means all ranks. Returns the model. A ValueError where the model holds PyTorch's own batch norms, which
    this cannot reach; a RuntimeError before `start`.
    """
    from .norm import Norm

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("synchronise: no process group was started; wanted one over whose ranks to normalise. Call distributed.start() under torchrun.")
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            raise ValueError(
                f"synchronise: {name or 'the model'} is a torch.nn.{type(layer).__name__}, which normalises on each rank alone; wanted fastsnn.norm. "
                "Convert the model first: torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)."
            )
        if isinstance(layer, Norm):
            layer.group = dist.group.WORLD if group is None else group
    return model


def world() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) of this process; (0, 1, 0) for one that runs alone."""
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    elif _launched():
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        return 0, 1, 0
    return rank, size, int(os.environ.get("LOCAL_RANK", rank))


def _launched() -> bool:
    """Whether torchrun (or what sets the same variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def start(device: str | torch.device = "cpu") -> tuple[int, int, int]:
    """Join the processes that torchrun started, over gloo on a CPU and NCCL on a GPU; return `world()`.

    device: `cpu` or `cuda`; on GPUs each process takes the one of its rank on the machine as current device. Without
    torchrun nothing is started, and the answer is (0, 1, 0). A second call changes nothing.
    """
    device = torch.device(device)
    if not _launched() or (dist.is_available() and dist.is_initialized()):
        return world()
    if not dist.is_available():
        raise RuntimeError("start: torchrun started this process, but this build of PyTorch has no torch.distributed. Install one that has, or run without torchrun.")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"start: device is {str(device)!r}; wanted cpu or cuda.")
    if device.type == "cpu":
        dist.init_process_group("gloo")
        return world()
    local = world()[2]
    if local >= torch.cuda.device_count():
        raise RuntimeError(
            f"start: rank {local} on this machine has no GPU of its own: PyTorch sees {torch.cuda.device_count()}. "
            "Start as many processes as GPUs, torchrun --nproc-per-node=gpu, or train with device=cpu."
        )
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    return world()


def finish() -> None:
    """Leave the group that `start` joined; without one, nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process is the one that prints and writes: rank 0, or alone."""
    return world()[0] == 0
