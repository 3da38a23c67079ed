"""Batches and their augmentation against plain loops; what is fetched is whole or absent."""

import hashlib
import http.server
import threading
from pathlib import Path

import pytest
import torch
from cases import assert_same_bits
from fastsnn.data import Augment, Batches, fetch, generator
from torch import Tensor

X = torch.randint(256, (50, 3, 10, 12), dtype=torch.uint8, generator=generator(1))
Y = torch.randint(10, (50,), generator=generator(2))

SETTINGS = [(4, True, 0), (4, False, 0), (0, True, 0), (0, False, 5), (2, True, 16), (15, True, 4), (1, False, 1), (0, False, 0)]
AUGMENTS = [Augment(crop=crop, flip=flip, cutout=cutout) for crop, flip, cutout in SETTINGS]
every_augment = pytest.mark.parametrize("augment", AUGMENTS, ids=repr)


def plainly(augment: Augment, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Pixel by pixel, from what was drawn."""
    out = torch.zeros_like(images)
    count, channels, height, width = images.shape
    for n in range(count):
        top, left = (int(drawn[name][n]) - augment.crop if augment.crop else 0 for name in ("top", "left"))
        for row in range(height):
            for column in range(width):
                across = width - 1 - column if augment.flip and drawn["flipped"][n] else column
                if not (0 <= row + top < height and 0 <= across + left < width):
                    continue
                if augment.cutout:
                    down, right = row - int(drawn["row"][n]) + augment.cutout // 2, column - int(drawn["column"][n]) + augment.cutout // 2
                    if 0 <= down < augment.cutout and 0 <= right < augment.cutout:
                        continue
                out[n, :, row, column] = images[n, :, row + top, across + left]
    return out


@every_augment
@pytest.mark.parametrize("kind", ["uint8", "float32", "channels last"])
def test_augment_is_the_plain_loop(augment, kind):
    images = X[:12] + (X[:12] == 0).to(torch.uint8)  # so that a 0 is one of padding or cutout
    images = {"uint8": images, "float32": images.float() / 255, "channels last": images.contiguous(memory_format=torch.channels_last)}[kind]
    before = images.clone()
    found = augment(images, generator(7))
    assert found.dtype == images.dtype
    assert torch.equal(found, plainly(augment, images, augment.draw(12, 10, 12, generator(7))))
    assert torch.equal(images, before), "the images given were written to"


def test_what_is_drawn_covers_its_range():
    drawn = Augment(4, True, 3).draw(4000, 10, 12, generator(0))
    for name, high in {"top": 9, "left": 9, "flipped": 2, "row": 10, "column": 12}.items():
        counts = drawn[name].long().bincount()
        assert len(counts) == high
        expected = 4000 / high
        assert ((counts - expected).abs() < 5 * expected**0.5).all(), f"{name} is not uniform"


@every_augment
def test_parts_of_a_batch_are_augmented_as_the_whole(augment):
    whole = augment(X, generator(3))
    parts = [augment(X[first:end], generator(3), total=50, start=first) for first, end in ((0, 7), (7, 7), (7, 40), (40, 50))]
    assert torch.equal(torch.cat(parts), whole)


def test_augment_refuses():
    for name, value in (("crop", -1), ("crop", 1.5), ("cutout", True), ("cutout", "8")):
        with pytest.raises(ValueError, match=f"Augment: {name} is {value!r}; wanted a number of pixels"):
            Augment(**{name: value})
    with pytest.raises(ValueError, match=r"images have shape \[3, 10, 12\]; wanted \[N, C, H, W\]"):
        Augment()(X[0], generator(0))
    with pytest.raises(ValueError, match="images 45 to 55 of 50; wanted a part"):
        Augment()(X[:10], generator(0), total=50, start=45)


def test_the_generator_of_a_key():
    first = [torch.rand(4, generator=generator(*key)) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 12), (0, 1, "2"))]
    assert torch.equal(first[0], first[1])
    assert len({tuple(numbers.tolist()) for numbers in first}) == 5


def make(**options) -> Batches:
    return Batches(X, Y, **({"batch_size": 12, "seed": 5, "augment": Augment(2, True, 3)} | options))


def assert_same_batches(found: list, want: list) -> None:
    assert len(found) == len(want)
    for batch, expected in zip(found, want):
        for name, values, wanted in zip(("images", "labels", "indices"), batch, expected):
            assert_same_bits(name, values.contiguous(), wanted.contiguous())


def test_batches_are_their_images():
    for images, labels, indices in make(augment=None).epoch(3):
        assert images.dtype == torch.float32 and labels.dtype == indices.dtype == torch.int64
        assert_same_bits("images", images, X[indices].float() / 255)
        assert torch.equal(labels, Y[indices])
    number = 2
    images, labels, indices = list(make().epoch(3))[number]
    assert_same_bits("images", images, Augment(2, True, 3)(X[indices], generator(5, 3, number)).float() / 255)


def test_pixels_are_divided_truly():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    (images, _, _), = Batches(x, Y[:1], 1, seed=0).epoch(0)
    assert [float(value) for value in images.flatten()] == [float(torch.tensor(value / 255, dtype=torch.float32)) for value in range(256)]


@pytest.mark.parametrize("drop_last, batches, images", [(True, 4, 48), (False, 5, 50)])
def test_an_epoch_takes_each_image_once(drop_last, batches, images):
    made = make(drop_last=drop_last)
    seen = torch.cat([indices for _, _, indices in made.epoch(0)])
    assert len(made) == len(list(made.epoch(0))) == batches
    assert len(seen) == len(seen.unique()) == images
    orders = [made.order(epoch) for epoch in range(3)] + [make(seed=6).order(0)]
    assert len({tuple(order.tolist()) for order in orders}) == 4, "two epochs or seeds have one order"
    assert torch.equal(torch.cat([indices for _, _, indices in make(shuffle=False, drop_last=drop_last).epoch(2)]), torch.arange(images))


def test_batches_repeat_and_do_not_depend_on_what_ran_before():
    made = make()
    want = list(made.epoch(1))
    torch.manual_seed(99)
    list(made.epoch(0))
    half = iter(made.epoch(1))
    next(half)
    state = torch.get_rng_state()
    assert_same_batches(list(made.epoch(1)), want)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"
    assert_same_batches(list(half), want[1:])
    assert_same_batches(list(make().epoch(1)), want)
    assert not torch.equal(next(iter(made.epoch(2)))[0], want[0][0])


@pytest.mark.parametrize("start", range(6))
def test_an_epoch_goes_on_at_a_batch(start):
    made = make(drop_last=False)
    assert_same_batches(list(made.epoch(2, start=start)), list(made.epoch(2))[start:])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [2, 3, 4, 12])
def test_ranks_together_are_one_process(world, drop_last):
    want = list(make(drop_last=drop_last).epoch(4))
    ranks = [list(make(drop_last=drop_last, rank=rank, world=world).epoch(4)) for rank in range(world)]
    assert_same_batches([tuple(map(torch.cat, zip(*parts))) for parts in zip(*ranks)], want)
    assert {len(rank[0][0]) for rank in ranks} == {12 // world}


def test_channels_last_changes_the_layout_alone():
    found = list(make(channels_last=True).epoch(0))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images, _, _ in found)
    assert_same_batches(found, list(make().epoch(0)))


@pytest.mark.parametrize("options, words", [
    ({"x": X.float()}, r"x is torch.float32 of shape \[50, 3, 10, 12\]; wanted uint8"),
    ({"x": X[:, 0]}, r"x is torch.uint8 of shape \[50, 10, 12\]; wanted uint8 \[N, C, H, W\]"),
    ({"y": Y.int()}, r"y is torch.int32 of shape \[50\]; wanted int64 \[50\]"),
    ({"y": Y[:9]}, r"y is torch.int64 of shape \[9\]; wanted int64 \[50\]"),
    ({"batch_size": 0}, "batch_size is 0; wanted an int >= 1"),
    ({"batch_size": 51}, "x holds 50 images, fewer than one batch of 51; wanted more. Lower batch_size, or set drop_last=False"),
    ({"rank": 2, "world": 2}, "rank is 2 of 2; wanted 0 to world - 1"),
    ({"world": 5}, "a batch of 12 does not divide among 5 processes; wanted a multiple, such as 15"),
])  # fmt: skip
def test_batches_refuse(options, words):
    with pytest.raises(ValueError, match=words):
        Batches(**({"x": X, "y": Y, "batch_size": 12, "seed": 0} | options))


def test_a_start_behind_the_end_is_refused_at_once():
    with pytest.raises(ValueError, match="start is 5; wanted a batch, 0 to 4"):
        make().epoch(0, start=5)


# Fetching.

CONTENTS = bytes(range(256)) * 3000
SUM = hashlib.sha256(CONTENTS).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """Breaks off after `limit` bytes of an answer while `breaks` lasts; knows ranges if `ranges`."""

    breaks, limit, ranges, contents = 0, 200_000, True, CONTENTS
    asked: list

    def do_GET(self) -> None:
        cls = type(self)
        wanted = self.headers.get("Range")
        cls.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and cls.ranges else 0
        if self.path != "/file" or start >= len(cls.contents):
            self.send_error(404 if self.path != "/file" else 416)
            return
        body = cls.contents[start:]
        self.send_response(206 if wanted and cls.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        if wanted and cls.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(cls.contents) - 1}/{len(cls.contents)}")
        self.end_headers()
        cls.breaks -= 1
        self.wfile.write(body[: cls.limit] if cls.breaks >= 0 else body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Server,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_port}/file"
        yield handler
        running.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_fetch(server, tmp_path):
    path = fetch(server.url, tmp_path / "x", SUM.upper())
    assert path.read_bytes() == CONTENTS and names(tmp_path) == ["x"]
    fetch(server.url, path, SUM)
    assert server.asked == [None], "what is there was fetched again"


@pytest.mark.parametrize("ranges", [True, False])
def test_fetch_goes_on_where_it_broke_off(server, tmp_path, ranges):
    server.breaks, server.ranges = 2, ranges
    assert fetch(server.url, tmp_path / "x", SUM).read_bytes() == CONTENTS
    assert server.asked == [None, "bytes=200000-", f"bytes={400000 if ranges else 200000}-"]
    assert names(tmp_path) == ["x"]


def test_fetch_leaves_no_half_file(server, tmp_path):
    server.breaks = 3
    with pytest.raises(ConnectionError, match="broke off 3 times.*168000 bytes are missing.*the next call goes on from there"):
        fetch(server.url, tmp_path / "x", SUM)
    assert names(tmp_path) == ["x.part"]
    assert fetch(server.url, tmp_path / "x", SUM).read_bytes() == CONTENTS
    assert server.asked[-1] == "bytes=600000-"


@pytest.mark.parametrize("stale", [b"another beginning", CONTENTS + b"and more"], ids=["another file", "longer than the file"])
def test_fetch_begins_anew_where_the_part_is_of_another_file(server, tmp_path, stale):
    (tmp_path / "x.part").write_bytes(stale)
    assert fetch(server.url, tmp_path / "x", SUM).read_bytes() == CONTENTS
    assert server.asked[-1] is None and names(tmp_path) == ["x"]


def test_fetch_keeps_nothing_that_is_wrong(server, tmp_path):
    server.contents = CONTENTS[:-1] + b"?"
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ValueError, match=f"has the SHA-256 .*; wanted {SUM}. Nothing was kept"):
        fetch(server.url, tmp_path / "x", SUM)
    assert names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"
    assert len(server.asked) == 1


def test_fetch_where_nothing_is(server, tmp_path):
    with pytest.raises(ConnectionError, match="answers 404 .*Check the address"):
        fetch(server.url + "s", tmp_path / "x", SUM)
    with pytest.raises(ValueError, match="ftp://x/y is of an unknown kind; wanted http://"):
        fetch("ftp://x/y", tmp_path / "x", SUM)
    with pytest.raises(ConnectionError, match="broke off 2 times"):
        fetch((tmp_path / "none").as_uri(), tmp_path / "x", SUM, tries=2)
    assert names(tmp_path) == []


def test_fetch_a_file(tmp_path):
    (tmp_path / "a").write_bytes(CONTENTS)
    (tmp_path / "b.part").write_bytes(CONTENTS[:99])
    assert fetch((tmp_path / "a").as_uri(), tmp_path / "b", SUM).read_bytes() == CONTENTS
    assert names(tmp_path) == ["a", "b"]
