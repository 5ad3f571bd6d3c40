"""Files of ``torch.save`` that can be read back, or are refused.

``torch.save`` writes values that ``torch.load(weights_only=True)`` refuses to read:
:func:`write` refuses them first. ``torch.load`` reads entries that the disk has
damaged, since it does not look at the CRC-32 that the archive holds of each:
:func:`read` does.
"""

import copy
import io
import os
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

import torch
from torch import Tensor

from sf_torch._files import write_whole

SAFE = (type(None), bool, int, float, complex, str, bytes)
TENSORS = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def write(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Writes what :func:`read` gives back, whole or not at all.

    Scalars of NumPy and the like are written as Python numbers.

    Raises:
      ValueError: an entry that ``weights_only`` loading refuses, or that is sharded;
        nothing is written then.
      OSError: as for :func:`sf_torch._files.write_whole`.
    """
    readable = _readable(content, "", ())
    computes = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        write_whole(path, lambda file: torch.save(readable, file))
    finally:
        torch.serialization.set_crc32_options(computes)


def read(path: str | os.PathLike[str]) -> Any:
    """What :func:`write` wrote, on the CPU.

    Raises:
      ValueError: the file is damaged or holds code; nothing of it is run.
    """
    with open(path, "rb") as file:
        _check_sums(path, file)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise  # nothing that the file says
        except Exception as error:  # as many kinds as there are objects
            raise ValueError(
                f"{path} holds code or objects, which are never run. Load a file that "
                "save_checkpoint wrote."
            ) from error


def refuse_sharded(values: Mapping[str, Any]) -> None:
    """Raises ValueError, naming them, where values are shards of tensors."""
    sharded = [name for name, value in values.items() if hasattr(value, "to_local")]
    if sharded:
        raise ValueError(
            f"sharded over processes: {', '.join(sharded)}. A file that one process "
            "writes would hold its shards alone. Use torch.distributed.checkpoint, "
            "which takes the state dicts of model and optimizer as they are."
        )


def _check_sums(path: str | os.PathLike[str], file: IO[bytes]) -> None:
    entry = "its table of entries"
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                entry = info.filename
                # What torch reads by and no sum covers: it compresses nothing, and
                # takes what is marked as a folder to be empty.
                is_folder = info.external_attr & 0x10
                sizes_differ = info.file_size != info.compress_size
                if info.compress_type or is_folder or sizes_differ:
                    raise zipfile.BadZipFile("Bad size or attribute")
                with archive.open(info) as part:
                    while part.read(1 << 20):
                        pass
    except Exception as error:  # as many kinds as there are ways to be damaged
        raise ValueError(
            f"{path} is damaged in {entry}: {error}. Load another file that "
            "save_checkpoint wrote."
        ) from error
    file.seek(0)


def _readable(value: Any, where: str, around: tuple[int, ...]) -> Any:
    """The value as ``weights_only`` reads it; containers are new, tensors the same."""
    kind = type(value)
    if kind in SAFE or (kind in TENSORS and not value.__dict__):
        return value
    if kind in (dict, OrderedDict, list, tuple):
        if id(value) in around or len(around) > 100:
            raise ValueError(
                f"{where} contains itself, or lies more than 100 containers deep. "
                "Leave it out of the checkpoint, or flatten it."
            )
        around = (*around, id(value))
        if kind in (list, tuple):
            return kind(
                _readable(v, f"{where}[{i}]", around) for i, v in enumerate(value)
            )
        new = copy.copy(value)  # with what hangs on it: _metadata of a state dict
        for key, v in value.items():
            at = f"{where}[{key!r}]" if where else str(key)
            _check_reading(key, f"the key {at}")
            new[key] = _readable(v, at, around)
        return new
    if getattr(value, "shape", None) == () and not isinstance(value, Tensor):
        number = value.item()
        if type(number) in SAFE:
            return number
    _check_reading(value, where)
    return value


def _check_reading(value: Any, where: str) -> None:
    """Asks torch itself, whose list of what it reads grows."""
    if type(value) in SAFE:
        return
    refuse_sharded({where: value})
    try:
        memory = io.BytesIO()
        torch.save(value, memory)
        memory.seek(0)
        torch.load(memory, weights_only=True)
    except Exception as error:  # as many kinds as there are objects
        raise ValueError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which "
            "torch.load(weights_only=True) does not read. Give numbers, strings, "
            "tensors, or lists, tuples and dicts of them: str(path), "
            "torch.from_numpy(array), date.isoformat()."
        ) from error
