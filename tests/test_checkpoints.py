"""Files of a run: whole at any moment, and clear errors for those that are not."""

import errno
import json
import os
import signal

import pytest
import torch
from fastsnn import checkpoints
from fastsnn.recipes import Config

STATE = {"step": 7, "loss": 0.1 + 0.2, "best": None}


def tensors():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 4, 5, generator=generator)
    return {
        "float32": torch.randn(3, 5, generator=generator),
        "float64": torch.randn(4, generator=generator, dtype=torch.float64),
        "bfloat16": torch.randn(6, generator=generator).bfloat16(),
        "int64": torch.arange(3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "channels_last": image.to(memory_format=torch.channels_last),
        "view": image[:, 1],
    }


def test_what_is_saved_is_loaded(tmp_path):
    path, saved = tmp_path / "a.safetensors", tensors()
    saved["shared"] = saved["float32"]
    checkpoints.save(path, saved, STATE)
    found, state = checkpoints.load(path)
    assert state == STATE and set(found) == set(saved)
    for name, tensor in saved.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_no_space_left(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, tensors(), STATE)
    before = path.read_bytes()

    def full(part):
        part.touch()
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr(checkpoints, "_open", full)
    with pytest.raises(OSError, match="no space left on the disk.*a.safetensors of before is untouched") as error:
        checkpoints.save(path, tensors(), {"step": 8})
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(OSError, match="nothing half is left"):
        checkpoints.write_json(tmp_path / "new.json", {})


def test_no_folder_and_no_permission(tmp_path):
    with pytest.raises(OSError, match="its folder is gone"):
        checkpoints.write(tmp_path / "gone" / "a", b"x")
    (tmp_path / "b").mkdir()
    with pytest.raises(OSError, match="b cannot be written: "):
        checkpoints.write(tmp_path / "b", b"x")
    assert os.listdir(tmp_path) == ["b"]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A file in whose middle the process is killed."""

    def __init__(self, path):
        self.file = open(path, "wb", buffering=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        die()


def kill_at(moment):
    where = {"in the middle": (checkpoints, "_open", HalfWritten), "before the flush": (os, "fsync", die), "before the rename": (os, "replace", die)}
    setattr(*where.get(moment, (checkpoints, "_flush_folder", die)))


@pytest.mark.parametrize("moment, wanted", [("in the middle", 7), ("before the flush", 7), ("before the rename", 7), ("after the rename", 8)])
def test_killed_while_writing(tmp_path, moment, wanted):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, tensors(), STATE)
    child = os.fork()
    if not child:
        try:
            kill_at(moment)
            checkpoints.save(path, tensors(), {"step": 8})
        finally:
            os._exit(1)  # not reached
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    found, state = checkpoints.load(path)
    assert state["step"] == wanted and set(found) == set(tensors())
    checkpoints.save(path, tensors(), {"step": 9})  # what a killed process left is no obstacle
    assert checkpoints.load(path)[1]["step"] == 9 and os.listdir(tmp_path) == ["a.safetensors"]


def test_damaged_and_foreign_files(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoints.save(path, tensors(), STATE)
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-1], b"PK" + whole):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a.safetensors: not a complete safetensors file"):
            checkpoints.load(path)
    from safetensors.torch import save

    path.write_bytes(save({"weight": torch.ones(1)}))
    with pytest.raises(ValueError, match="not a checkpoint of this fastsnn"):
        checkpoints.load(path)
    with pytest.raises(FileNotFoundError, match="there is no such checkpoint"):
        checkpoints.load(tmp_path / "none")


def test_state_is_json(tmp_path):
    with pytest.raises(ValueError):
        checkpoints.save(tmp_path / "a", {}, {"loss": float("nan")})
    assert not os.listdir(tmp_path)


def test_lines_cut_off_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    assert checkpoints.read_lines(path) == []
    checkpoints.append_line(path, {"step": 1})
    checkpoints.append_line(path, {"step": 2, "loss": 0.1})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert checkpoints.read_lines(path) == [{"step": 1}, {"step": 2, "loss": 0.1}]
    with pytest.raises(OSError, match="no space left"):
        checkpoints.append_line("/dev/full", {"step": 4})


def test_fingerprint(tmp_path):
    """Of the weights alone: each bit, type, shape and name of them counts, and nothing else in the file."""
    path = tmp_path / "a"

    def of(weights, state=STATE, **others):
        checkpoints.save(path, {**{f"model.{name}": tensor for name, tensor in weights.items()}, **others}, state)
        return checkpoints.fingerprint(path)

    first = of(tensors())
    assert len(first) == 16 and of(dict(reversed(tensors().items()))) == first
    assert of(tensors(), {"step": 8, "seconds": 1.5}, **{"optimizer.0.momentum_buffer": torch.ones(3)}) == first
    for name, tensor in tensors().items():
        others = {**tensors(), name: tensor.double() if tensor.dtype != torch.float64 else tensor.float()}, {**tensors(), name: tensor[None]}
        assert first not in map(of, others), name
        if tensor.numel():
            changed = tensor.contiguous().clone()
            changed.view(-1).view(torch.uint8)[-1] ^= 1
            assert of({**tensors(), name: changed}) != first, name
    renamed = tensors()
    renamed["other"] = renamed.pop("scalar")
    assert of(renamed) != first
    bytes_before = path.read_bytes()
    state = {"seconds": 2.5}
    assert of(renamed) == of(renamed, state) and path.read_bytes() != bytes_before


def test_runs_of_before_are_read(tmp_path):
    """A folder whose settings hold the numbers that `auto` stands for, or defaults of defenses that are not used."""
    config = {"model": "wrn16_4", "defense": "vanilla", "at_eps": "2/255", "at_steps": 2, "at_step_size": "1/255", "beta": 0.001, "weight_decay": "0.0005"}
    for changes, kept in (
        ({}, {"at_step_size": "auto", "beta": "auto", "weight_decay": "auto"}),
        ({"defense": "at", "weight_decay": "0.0"}, {"at_step_size": "auto", "beta": "auto", "weight_decay": "0.0"}),
        ({"defense": "at+reg", "at_eps": "8/255", "weight_decay": "0"}, {"at_step_size": "1/255", "beta": "0.001", "weight_decay": "auto"}),
        ({"defense": "of another package"}, {"at_step_size": "auto", "beta": "auto", "weight_decay": "auto"}),
    ):
        (tmp_path / "run.json").write_text(json.dumps({"format": 1, "config": {**config, **changes}}))
        found = checkpoints.read_run(tmp_path)["config"]
        assert found == {**config, **changes, **kept}, changes
        if changes.get("defense") != "of another package":
            Config(**found)
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, "config": {"lr": 0.1, "weight_decay": "x"}}))
    assert checkpoints.read_run(tmp_path)["config"] == {"lr": 0.1, "weight_decay": "x"}


def test_folders_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        checkpoints.read_run(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="run.json is missing"):
        checkpoints.read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        checkpoints.read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match="format of the run is 0"):
        checkpoints.read_run(tmp_path)
    with pytest.raises(ValueError, match="which is 'bset'.*Did you mean 'best'"):
        checkpoints.load_run(tmp_path, "bset")
