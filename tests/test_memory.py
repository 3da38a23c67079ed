"""Blocks of memory that results live in, on a CPU."""

import copy
import pickle

import fastsnn
import pytest
import torch
from fastsnn import memory

SIZE = memory.SMALLEST // 4  # neurons of one step


@pytest.fixture(autouse=True)
def empty_start(monkeypatch):
    monkeypatch.setattr(memory, "_blocks", [])
    monkeypatch.setattr(memory, "_most_live", 0)


def spikes(seed: int, steps: int = 2) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return fastsnn.lif(torch.randn(steps, SIZE, generator=draw), backend="cpu").spikes


def test_a_block_is_used_again_once_its_tensor_is_gone():
    first = spikes(0)
    place = first.data_ptr()
    assert spikes(1).data_ptr() != place
    del first
    assert spikes(2).data_ptr() == place


@pytest.mark.parametrize("holder", [lambda t: t[1:], lambda t: t.T, lambda t: [t], lambda t: t.numpy(), lambda t: t.untyped_storage()])
def test_a_block_is_not_used_while_anything_looks_at_it(holder):
    first = spikes(0)
    want, place, held = first.clone(), first.data_ptr(), holder(first)
    del first
    others = [spikes(seed) for seed in (1, 2, 3)]
    assert all(other.data_ptr() != place for other in others)
    again = torch.as_tensor(held[0] if isinstance(held, list) else held) if not isinstance(held, torch.UntypedStorage) else None
    if again is not None and again.shape == want.shape:
        assert torch.equal(again, want)


def test_a_graph_keeps_what_it_saved():
    x = torch.randn(2, SIZE, requires_grad=True)
    hidden = fastsnn.lif(x, backend="cpu").spikes * 1.5 + x
    out = fastsnn.lif(hidden, backend="cpu").spikes
    want = torch.autograd.grad(out.sum(), x, retain_graph=True)[0].clone()
    del hidden
    for seed in range(4):
        spikes(seed)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], want)


def test_held_memory_stays_below_half_again_what_was_in_use_at_once():
    for steps in (2, 3, 4, 5, 6, 3, 2, 7):
        spikes(0, steps)
        held = sum(map(len, memory._blocks))
        assert held <= 1.5 * memory._most_live
    assert memory._most_live <= (7 + 1) * SIZE * 4  # one result and its state


def test_training_steps_map_no_new_memory(monkeypatch):
    x = torch.randn(4, SIZE, requires_grad=True)

    def step():
        torch.autograd.grad(fastsnn.lif(x, backend="cpu").spikes.sum(), x)

    step(), step()
    monkeypatch.setattr(memory.mmap, "mmap", lambda *_, **__: pytest.fail("a new block was mapped"))
    step(), step()


def test_release_gives_back_what_is_free_and_nothing_else():
    kept = spikes(0)
    want = kept.clone()
    spikes(1)
    assert memory.release() > 0
    assert memory.release() == 0
    spikes(2)
    assert torch.equal(kept, want)


def test_results_copy_pickle_and_share_like_other_tensors():
    first = spikes(0)
    for other in (copy.deepcopy(first), pickle.loads(pickle.dumps(first)), first.clone().share_memory_()):
        assert torch.equal(other, first)
    assert torch.equal(first.add_(1) - 1, spikes(0))
