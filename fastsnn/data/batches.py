"""The batches of a training run, and their augmentation: a function of (seed, epoch, batch) and of nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def generator(*key: int | str) -> torch.Generator:
    """A generator of random numbers on the CPU for a key such as (seed, epoch, batch): the same key, the same numbers.

    >>> torch.randint(10, (3,), generator=generator(0, 2, 17))
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Augment:
    """Random crop, horizontal flip and cutout of a whole batch, on the device that holds it.

    crop: pixels of zeros added at each side before a window of the image's size is cut out; 0: none.
    flip: mirror left and right with probability 1/2.
    cutout: side in pixels of a square that is set to 0, its centre uniform over the image, cut off at the edges; 0: none
        (DeVries & Taylor 2017).

    The random numbers come from a generator on the CPU, so that every device crops alike.

    >>> augment = Augment(crop=4, flip=True, cutout=0)
    >>> augment(images, generator(seed, epoch, batch))
    """

    def __init__(self, crop: int = 4, flip: bool = True, cutout: int = 0) -> None:
        for name, value in (("crop", crop), ("cutout", cutout)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"Augment: {name} is {value!r}; wanted a number of pixels, an int >= 0.")
        self.crop, self.flip, self.cutout = crop, bool(flip), cutout

    def __repr__(self) -> str:
        return f"Augment(crop={self.crop}, flip={self.flip}, cutout={self.cutout})"

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What happens to each of `count` images, [count] tensors on the CPU: the window's `top` and `left` in the padded
        image, whether it is `flipped`, the `row` and `column` of the cutout's centre."""
        if generator.device.type != "cpu":
            raise ValueError(f"Augment: the generator is on {generator.device}; wanted one on the CPU, so that every device draws the same.")

        def draw(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        drawn = {}
        if self.crop:
            drawn |= {"top": draw(2 * self.crop + 1), "left": draw(2 * self.crop + 1)}
        if self.flip:
            drawn["flipped"] = draw(2).bool()
        if self.cutout:
            drawn |= {"row": draw(height), "column": draw(width)}
        return drawn

    def __call__(self, images: Tensor, generator: torch.Generator, total: int | None = None, start: int = 0) -> Tensor:
        """images: [n, C, H, W] of any dtype, which are number start to start + n of a batch of `total` (default: all of
        it). The numbers are drawn for the whole batch: its parts, augmented apart, are those of the batch."""
        if images.dim() != 4:
            raise ValueError(f"Augment: images have shape {list(images.shape)}; wanted [N, C, H, W].")
        count, channels, height, width = images.shape
        total = start + count if total is None else total
        if not 0 <= start <= start + count <= total:
            raise ValueError(f"Augment: images {start} to {start + count} of {total}; wanted a part of the batch.")
        drawn = self.draw(total, height, width, generator)
        drawn = {name: values[start : start + count].to(images.device, non_blocking=True) for name, values in drawn.items()}
        rows = torch.arange(height, device=images.device).expand(count, height)
        columns = torch.arange(width, device=images.device).expand(count, width)
        if self.cutout:
            hole_rows = self._in_hole(rows, drawn["row"])
            hole_columns = self._in_hole(columns, drawn["column"])
            hole = (hole_rows[:, :, None] & hole_columns[:, None, :])[:, None]
        if self.flip:
            columns = torch.where(drawn["flipped"][:, None], width - 1 - columns, columns)
        if self.crop:
            images = F.pad(images, (self.crop,) * 4)
            rows, columns = rows + drawn["top"][:, None], columns + drawn["left"][:, None]
        if self.crop or self.flip:  # both in one gather: each output pixel has its place in the padded image
            place = rows[:, :, None] * images.shape[3] + columns[:, None, :]
            place = place.view(count, 1, height * width).expand(count, channels, height * width)
            images = images.reshape(count, channels, images.shape[2] * images.shape[3]).gather(2, place).view(count, channels, height, width)
        return images.masked_fill(hole, 0) if self.cutout else images

    def _in_hole(self, positions: Tensor, centre: Tensor) -> Tensor:
        first = centre[:, None] - self.cutout // 2
        return (positions >= first) & (positions < first + self.cutout)


class Batches:
    """The batches of each epoch, drawn without replacement: every image at most once (drop_last) or exactly once.

    x: [N, C, H, W] uint8, y: [N] int64, on one device; on that of the training nothing is copied between devices.
    batch_size: of the global batch. rank, world: this process takes the rank-th of `world` contiguous parts of each.
    augment: an `Augment` or None. device: where the batches go. channels_last: the memory format of the images.

    The order depends on (seed, epoch) and the augmentation on (seed, epoch, batch), not on rank, world, device or history.

    >>> batches = Batches(data.x_train, data.y_train, batch_size=64, seed=0, augment=Augment())
    >>> for images, labels, indices in batches.epoch(3, start=100): ...  # epoch 3 from its batch 100 on
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
    ) -> None:
        if x.dtype != torch.uint8 or x.dim() != 4:
            raise ValueError(f"Batches: x is {x.dtype} of shape {list(x.shape)}; wanted uint8 [N, C, H, W], pixels 0 to 255.")
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise ValueError(f"Batches: y is {y.dtype} of shape {list(y.shape)}; wanted int64 [{len(x)}], one label per image of x.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"Batches: batch_size is {batch_size!r}; wanted an int >= 1.")
        if not 0 <= rank < world:
            raise ValueError(f"Batches: rank is {rank} of {world}; wanted 0 to world - 1.")
        if batch_size % world:
            raise ValueError(f"Batches: a batch of {batch_size} does not divide among {world} processes; wanted a multiple, such as {-(-batch_size // world) * world}.")
        if len(x) < (batch_size if drop_last else 1):
            raise ValueError(f"Batches: x holds {len(x)} images, fewer than one batch of {batch_size}; wanted more. Lower batch_size, or set drop_last=False.")
        self.x, self.y, self.batch_size, self.seed, self.augment = x, y, batch_size, seed, augment
        self.shuffle, self.drop_last, self.rank, self.world = shuffle, drop_last, rank, world
        self.device, self.channels_last = torch.device(device), channels_last

    def __len__(self) -> int:
        """The batches of an epoch."""
        return len(self.x) // self.batch_size if self.drop_last else -(-len(self.x) // self.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The positions in x in the order of this epoch, [N] int64 on the CPU."""
        return torch.randperm(len(self.x), generator=generator(self.seed, epoch, "order")) if self.shuffle else torch.arange(len(self.x))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (images, labels, indices) of the batches from number `start` on.

        images: [n, C, H, W] float32, pixels in [0, 1]; labels, indices (positions in x): [n] int64; all on the device.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"Batches: start is {start}; wanted a batch, 0 to {len(self)}.")
        return self._batches(epoch, start)

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        order = self.order(epoch)
        # A tensor, not a number: a GPU multiplies by the reciprocal of a number, which is another value.
        white = torch.full((), 255.0, device=self.device)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for number in range(start, len(self)):
            whole = order[number * self.batch_size : (number + 1) * self.batch_size]
            first, end = (len(whole) * rank // self.world for rank in (self.rank, self.rank + 1))
            indices = whole[first:end]
            images, labels = (self._moved(values.index_select(0, indices.to(values.device))) for values in (self.x, self.y))
            if self.augment is not None:
                images = self.augment(images, generator(self.seed, epoch, number), total=len(whole), start=first)
            yield images.to(torch.float32, memory_format=layout).div_(white), labels, self._moved(indices)

    def _moved(self, values: Tensor) -> Tensor:
        if self.device.type == "cuda" and not values.is_cuda:
            values = values.pin_memory()
        return values.to(self.device, non_blocking=True)
