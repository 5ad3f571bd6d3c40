"""Damaged files: whichever bit has flipped, refused or the same data, never other."""

import random
import struct

import pytest
import torch
from torch_cases import identical, model_of, same, trained, values

import sf_torch
from sf_torch import _archive

FLIPS = 500


def saved(path):
    model = model_of()
    optimizer = trained(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1), model)
    sf_torch.save_checkpoint(path, model, optimizer, epoch=3)
    return model, optimizer


def recorded(path, steps=4):
    model = model_of()
    optimizer = trained(lambda p: sf_torch.AdamWScheduleFree(p, lr=0.1), model, 1)
    with sf_torch.record(optimizer, path, model=model):
        for seed in range(steps):
            for p in model.parameters():
                p.grad = torch.full_like(p, float(seed))
            optimizer.step()


def silently_other(path, read, seed, flips=FLIPS):
    """Flips of one bit each that read as other data than was written."""
    whole, wanted = path.read_bytes(), read(path)
    found = []
    chance = random.Random(seed)
    for _ in range(flips):
        at, bit = chance.randrange(len(whole)), chance.randrange(8)
        damaged = bytearray(whole)
        damaged[at] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            if not identical(read(path), wanted):
                found.append((at, bit))
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
    path.write_bytes(whole)
    return found


def test_no_flipped_bit_of_a_checkpoint_is_read_as_other_data(tmp_path):
    saved(tmp_path / "run.pt")
    assert silently_other(tmp_path / "run.pt", _archive.read, seed=0) == []


def test_no_flipped_bit_of_the_table_of_entries_is_read_as_other_data(tmp_path):
    # Every fourth bit of an entry's record: what torch reads by and no sum covers.
    path = tmp_path / "run.pt"
    saved(path)
    whole, wanted = path.read_bytes(), _archive.read(path)
    record = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"archive/data/0"))
    for bit in range(0, 8 * 46, 4):
        for offset in (0, 1, 3):
            damaged = bytearray(whole)
            damaged[record + bit // 8] ^= 1 << ((bit + offset) % 8)
            path.write_bytes(damaged)
            try:
                content = _archive.read(path)
            except ValueError:
                continue
            assert identical(content, wanted), (bit, offset)


def test_no_flipped_bit_of_a_record_is_read_as_other_data(tmp_path):
    recorded(tmp_path / "run.safetensors")
    path = tmp_path / "run.safetensors"
    assert silently_other(path, lambda p: list(sf_torch.read_record(p)), seed=1) == []


def test_a_damaged_checkpoint_says_which_entry_and_nothing_changes(tmp_path):
    path = tmp_path / "run.pt"
    model, optimizer = saved(path)
    whole = bytearray(path.read_bytes())
    y = values(model)
    (first,) = struct.unpack("<I", struct.pack("<f", values(model)[0].flatten()[0]))
    at = whole.rindex(struct.pack("<I", first))  # y, as the optimizer's part has it
    whole[at] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"damaged in archive/data/\d+: Bad CRC-32"):
        sf_torch.load_checkpoint(path, model, optimizer)
    assert same(values(model), y)


def test_a_checkpoint_has_its_sums_whatever_torch_is_told(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        model, optimizer = saved(tmp_path / "run.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert sf_torch.load_checkpoint(tmp_path / "run.pt", model, optimizer) == {
        "epoch": 3
    }


def headers(whole):
    at = 0
    while at < len(whole):
        yield at
        at += 16 + struct.unpack_from("<Q", whole, at)[0]


@pytest.mark.parametrize("part", ["length", "blob"])
@pytest.mark.parametrize("frame", [1, 3, 4])
def test_the_first_damaged_step_of_a_record_is_named(part, frame, tmp_path):
    path = tmp_path / "run.safetensors"
    recorded(path)
    whole = bytearray(path.read_bytes())
    at = list(headers(whole))[frame]
    # A longer length looks like a run that was killed.
    whole[at + (3 if part == "length" else 400)] ^= 0x40
    path.write_bytes(whole)
    frames = sf_torch.read_record(path)
    assert [next(frames).step for _ in range(frame)] == list(range(frame))
    with pytest.raises(ValueError, match=f"the frame after step {frame - 1}"):
        next(frames)


def test_steps_of_two_processes_in_one_record_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    recorded(path)
    whole = path.read_bytes()
    _, first, second, *_ = headers(whole)
    path.write_bytes(whole[:second] + whole[first:])
    with pytest.raises(ValueError, match="step 1 after step 1"):
        list(sf_torch.read_record(path))
    path.write_bytes(whole[:first] + whole[second:])
    with pytest.raises(ValueError, match="step 2 after step 0"):
        list(sf_torch.read_record(path))


def test_replay_says_what_is_damaged(tmp_path, capsys):
    from parity_tests.cli.main import main

    path = tmp_path / "run.safetensors"
    recorded(path)
    whole = bytearray(path.read_bytes())
    whole[list(headers(whole))[2] + 400] ^= 1
    path.write_bytes(whole)
    assert main(["replay", str(path)]) == 2
    assert "damaged in the frame after step 1" in "".join(capsys.readouterr())
