"""A record that cannot be replayed, or shows nothing, exits with 2 and one line."""

import itertools
import json
import math
import struct
import tracemalloc
import zlib
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

import sf_torch
from parity_tests.cli.main import main
from sf_torch import _record


def recorded(path, steps=3, shape=(4,), **options):
    w = torch.nn.Parameter(torch.ones(shape))
    optimizer = sf_torch.SGDScheduleFree([w], lr=0.1)
    optimizer.train()
    with sf_torch.record(optimizer, path, **options):
        for _ in range(steps):
            w.grad = torch.ones_like(w)
            optimizer.step()


def framed(blob):
    length = struct.pack("<QI", len(blob), zlib.crc32(blob))
    return length + struct.pack("<I", zlib.crc32(length)) + blob


def blobs(whole):
    while whole:
        (length,) = struct.unpack_from("<Q", whole)
        yield whole[16 : 16 + length]
        whole = whole[16 + length :]


def changed(blob, info=None, tensors=None):
    """The frame with other entries, and its checksums right; None removes an entry."""
    (length,) = struct.unpack_from("<Q", blob)
    frame = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"]["frame"])
    frame = {k: v for k, v in (frame | (info or {})).items() if v is not None}
    kept = {k: v for k, v in (load(blob) | (tensors or {})).items() if v is not None}
    return save(kept, {"frame": json.dumps(frame)})


def groups(**entries):
    group = {"params": ["0.0"], "k": 2, "lr": 0.1, "b1": 0.9, "z_dtype": "float32"}
    return {"groups": [group | entries]}


# Changes of the second step's frame.
MALFORMED: dict[str, dict[str, Any]] = {
    "a billion steps": {"info": {"step": 10**9}},
    "step that is no number": {"info": {"step": "2"}},
    "no step": {"info": {"step": None}},
    "unknown kind": {"info": {"kind": "stop"}},
    "second start": {"info": {"kind": "start"}},
    "no groups": {"info": {"groups": None}},
    "groups that are a number": {"info": {"groups": 3}},
    "count that disagrees": {"info": groups(k=7)},
    "name twice": {"info": groups(params=["0.0", "0.0"])},
    "other name": {"info": groups(params=["../0"])},
    "name that is a list": {"info": groups(params=[[]])},
    "NaN gradient": {"tensors": {"grad.0.0": torch.full((4,), torch.nan)}},
    "gradient of another shape": {"tensors": {"grad.0.0": torch.ones(5)}},
    "gradient of integers": {"tensors": {"grad.0.0": torch.ones(4, dtype=torch.int64)}},
    "y of another shape": {"tensors": {"y.0.0": torch.ones(2, 2)}},
    "gradient of no parameter": {"tensors": {"grad./etc/0": torch.ones(4)}},
    "tensor of no kind": {"tensors": {"w.0.0": torch.ones(4)}},
    "gradient of 8 bits": {
        "tensors": {"grad.0.0": torch.ones(4).to(torch.float8_e4m3fn)}
    },
    "y of another dtype": {"tensors": {"y.0.0": torch.ones(4, dtype=torch.float64)}},
    "more groups": {"info": {"groups": groups()["groups"] * 2}},
    "no lr": {"info": groups(lr=None)},
    "lr that is a word": {"info": groups(lr="0.1")},
    "lr that is NaN": {"info": groups(lr=float("nan"))},
    "lr beyond any float": {"info": groups(lr=10**400)},
}
# Changes of the first frame.
MALFORMED_START: dict[str, dict[str, Any]] = {
    "no optimizer": {"info": {"optimizer": None}},
    "optimizer that is a number": {"info": {"optimizer": 7}},
    "groups that are none": {"info": {"groups": []}},
    "missed steps that are a list": {"info": {"missed": [1]}},
    "infinite count": {"info": groups(k=float("inf"))},
    "name that is no parameter's": {"info": groups(params=["a/b"])},
    "no y": {"tensors": {"y.0.0": None}},
    "NaN in y": {"tensors": {"y.0.0": torch.full((4,), torch.nan)}},
    "state of another shape": {"tensors": {"state.z.0.0": torch.ones(2, 4)}},
    "state that is infinite": {"tensors": {"state.z.0.0": torch.full((4,), torch.inf)}},
    "state of no parameter": {"tensors": {"state.z.9.9": torch.ones(4)}},
}


def refused(path, capsys):
    assert main(["replay", str(path)]) == 2
    printed = "".join(capsys.readouterr())
    assert printed.count("\n") == 1, printed
    return printed


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        pytest.param(place, changes, id=name)
        for place, table in ((0, MALFORMED_START), (2, MALFORMED))
        for name, changes in table.items()
    ],
)
def test_malformed_frame_is_refused(place, changes, tmp_path, capsys):
    path = tmp_path / "run"
    recorded(path)
    frames = list(blobs(path.read_bytes()))
    frames[place] = changed(frames[place], **changes)
    path.write_bytes(b"".join(map(framed, frames)))
    refused(path, capsys)


BLOBS = {
    "empty": b"",
    "offsets outside": struct.pack("<Q", 61)
    + b'{"y.0.0":{"dtype":"F32","shape":[4],"data_offsets":[99,115]}}',
    "no metadata": struct.pack("<Q", 2) + b"{}",
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "header longer than the frame": struct.pack("<Q", 1 << 60) + b"{}",
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", BLOBS)
def test_what_is_no_safetensors_file_is_refused(name, place, tmp_path, capsys):
    path = tmp_path / "run"
    recorded(path)
    frames = list(blobs(path.read_bytes()))
    frames[place] = BLOBS[name]
    path.write_bytes(b"".join(map(framed, frames)))
    refused(path, capsys)


def test_a_header_of_gigabytes_takes_no_memory(tmp_path, capsys):
    path = tmp_path / "run"
    size = 4 << 30
    length = struct.pack("<QI", size, 0)
    header = length + struct.pack("<I", zlib.crc32(length))
    with open(path, "wb") as file:
        file.write(header + struct.pack("<Q", size - 8))
        file.truncate(16 + size)  # a hole, which takes no disk
    tracemalloc.start()
    try:
        refused(path, capsys)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_entries_of_another_kind_are_no_difference(tmp_path, capsys):
    """One entry at a time of the only step, where the options are read.

    A replay may take what it does not read.
    """
    path = tmp_path / "run"
    recorded(path, steps=1)
    start, step = blobs(path.read_bytes())
    (length,) = struct.unpack_from("<Q", step)
    frame = json.loads(json.loads(step[8 : 8 + length])["__metadata__"]["frame"])
    entries = frame["groups"][0]
    for entry, wrong in itertools.product(entries, ("x", {}, [1], math.nan)):
        info = {"groups": [entries | {entry: wrong}]}
        path.write_bytes(framed(start) + framed(changed(step, info=info)))
        code = main(["replay", str(path)])
        printed = "".join(capsys.readouterr())
        assert code in (0, 2), (entry, wrong, printed)
        assert code == 0 or printed.count("\n") == 1, (entry, wrong, printed)


def test_an_integer_power_of_gigabytes_takes_no_memory(tmp_path, capsys):
    path = tmp_path / "run"
    recorded(path)
    frames = list(blobs(path.read_bytes()))
    frames[1] = changed(frames[1], info=groups(k=1, r=10**30))
    path.write_bytes(b"".join(map(framed, frames)))
    refused(path, capsys)


def test_steps_skipped_for_a_nan_are_refused_by_name(tmp_path, capsys):
    w = torch.nn.Parameter(torch.ones(4))
    optimizer = sf_torch.AdamWScheduleFree([w], skip_nonfinite=True)
    optimizer.train()
    with sf_torch.record(optimizer, tmp_path / "run"):
        for value in (1.0, torch.nan, 1.0):
            w.grad = torch.full_like(w, value)
            optimizer.step()
    assert "skip_nonfinite=True" in refused(tmp_path / "run", capsys)


def test_comparing_nothing_is_no_success(tmp_path, capsys):
    recorded(tmp_path / "seldom", steps=3, every=50)
    assert "nothing to compare" in refused(tmp_path / "seldom", capsys)
    recorded(tmp_path / "empty", shape=(0, 3))
    assert "nothing to compare" in refused(tmp_path / "empty", capsys)


def test_random_rounding_is_refused_by_name(tmp_path, capsys):
    w = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = sf_torch.AdamWScheduleFree(
        [w], state_dtype=torch.bfloat16, rounding="stochastic"
    )
    optimizer.train()
    with sf_torch.record(optimizer, tmp_path / "run"):
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert 'rounding="stochastic"' in refused(tmp_path / "run", capsys)


def test_names_too_long_to_be_read_back_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_record, "MOST_JSON", 100)
    with pytest.raises(ValueError, match="a record holds up to 100"):
        recorded(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_parameters_of_one_name_are_not_recorded(tmp_path):
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = sf_torch.SGDScheduleFree(
        [{"params": [("w", a)]}, {"params": [("w", b)]}]
    )
    with pytest.raises(ValueError, match="the same name"):
        sf_torch.record(optimizer, tmp_path / "run")
