"""A training run written down: gradients, y and x, to be checked elsewhere.

The file is a sequence of frames, so that it can be written as the run goes:

    frame  = length (uint64), CRC-32 of the blob (uint32), CRC-32 of these 12 bytes
             (uint32), all little-endian; the blob
    blob   = one safetensors file: tensors, and JSON under "frame" in its metadata

The first frame says what is being recorded and where it stands, one frame follows for
each step, and one for each call of :meth:`Recorder.evaluated`. A run that was killed is
readable up to its last whole step: its last frame is cut off. Anything else that is
not whole is damage, which the length's own checksum tells apart.

A frame whose checksums hold may still be malformed, since anybody can write a file. It
is refused too. Reading a file takes the memory of its largest frame.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from sf_torch import _arguments
from sf_torch._archive import refuse_sharded
from sf_torch._files import write_whole

FORMAT = 2
_LENGTH = struct.Struct("<QI")
_SUM = struct.Struct("<I")
_JSON = struct.Struct("<Q")  # length of the JSON at the begin of a safetensors file
# Read into Python objects, JSON takes up to 24 times its bytes. AdamW's first frame
# has 600 bytes for a parameter with a name of 50 letters.
MOST_JSON = 1 << 24
_KINDS = ("start", "step", "evaluated")


class Frame(NamedTuple):
    """One entry of a recorded run."""

    kind: str  # "start", "step" or "evaluated"
    step: int  # steps taken since the recording began
    info: dict[str, Any]  # optimizer's class and options; groups, as they are now
    tensors: dict[str, Tensor]  # "grad.NAME", "y.NAME", "x.NAME", "state.KEY.NAME"

    def named(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix, by parameter: ``named("grad")``."""
        return {
            key.removeprefix(f"{prefix}."): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(f"{prefix}.")
        }


class Recorder:
    """What :func:`record` returns: records from ``with`` to the end of the block."""

    def __init__(
        self,
        optimizer: Any,
        path: str | os.PathLike[str],
        every: int = 1,
        model: torch.nn.Module | None = None,
    ) -> None:
        every = _arguments.check("every", every)
        _safetensors()
        self._names = _names(optimizer, model)
        refuse_sharded({name: p for p, name in self._names.items()})
        self.optimizer, self.path, self.every = optimizer, path, every
        self.step = 0
        self._grads: dict[str, Tensor] = {}
        self._stepping = False
        self._file: IO[bytes] | None = None
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Recorder":
        self.step = 0
        kind = type(self.optimizer)
        base = getattr(self.optimizer, "base", None)
        info = {
            "format": FORMAT,
            "every": self.every,
            "optimizer": f"{kind.__module__}.{kind.__qualname__}",
            "base": base and f"{type(base).__module__}.{type(base).__qualname__}",
            # Options that the wrapper keeps beside its groups.
            "options": {
                name: getattr(self.optimizer, name)
                for name in ("momentum", "weight_decay_at_y", "weight_lr_power", "r")
                # A β that grows is in the groups, as a number.
                if not callable(getattr(self.optimizer, name, len))
            },
            # Steps without a gradient of a parameter, which its bias correction skips.
            "missed": {
                name: int(state["missed"])
                for name, p in self._parameters()
                if (state := self.optimizer.state.get(p) or {}).get("missed")
            },
        }
        start = self._frame("start", info, {**self._iterates(), **self._state()})
        write_whole(self.path, lambda file: file.write(start))
        self._file = open(self.path, "ab")  # open over many steps
        self._attach()
        return self

    def __exit__(self, *exception: object) -> None:
        while self._undo:
            self._undo.pop()()
        assert self._file is not None
        self._file.close()

    @torch.no_grad()
    def evaluated(self) -> None:
        """Notes the parameters as they are, for those that you evaluate or ship.

        Call it where the validation metric is taken: the replay then says whether
        these weights are x.
        """
        self._write(
            "evaluated", {}, {f"x.{n}": _copy(p) for n, p in self._parameters()}
        )

    def _attach(self) -> None:
        optimizer = self.optimizer
        if hasattr(optimizer, "_optimizer_step_pre_hooks"):
            before = optimizer.register_step_pre_hook(self._before)
            after = optimizer.register_step_post_hook(lambda *_: self._after())
            self._undo += [before.remove, after.remove]
            return
        # Meta's wrapper is an Optimizer by name only and knows no hooks.
        step = optimizer.step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            args = (optimizer, *args)
            args, kwargs = self._before(optimizer, args, kwargs) or (args, kwargs)
            result = step(*args[1:], **kwargs)
            self._after()
            return result

        optimizer.step = recorded
        self._undo.append(lambda: optimizer.__dict__.pop("step", None))

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        self._stepping = True
        # Now, since a step may change the gradients in place, as Meta's AdamW does.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._note_gradients()
            return None

        def noted() -> Any:
            result = closure()
            self._note_gradients()
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": noted}
        return (args[0], noted, *args[2:]), kwargs

    @torch.no_grad()
    def _note_gradients(self) -> None:
        self._grads = {
            f"grad.{name}": _copy(p.grad)
            for name, p in self._parameters()
            if p.grad is not None
        }

    def _after(self) -> None:
        if not self._stepping:  # a subclass's step around this one
            return
        self._stepping = False
        self.step += 1
        due = self.step % self.every == 0
        self._write("step", {}, self._grads | (self._iterates() if due else {}))
        self._grads = {}

    @torch.no_grad()
    def _iterates(self) -> dict[str, Tensor]:
        """y and x, whatever the mode."""
        tensors: dict[str, Tensor] = {}
        for group in self.optimizer.param_groups:
            b1 = _beta(self.optimizer, group)
            at_y = group.get("train_mode", getattr(self.optimizer, "train_mode", True))
            for p in group["params"]:
                name, state = self._names[p], self.optimizer.state.get(p) or {}
                x = y = p
                if "z" in state:
                    z = state["z"].to(torch.promote_types(p.dtype, torch.float64))
                    if "x" in state:
                        x = state["x"]
                    elif at_y:
                        # Meta's packages keep x in no form but this one.
                        x = (p + (1 - b1) / b1 * (p - z)).to(state["z"].dtype)
                    if not at_y:
                        y = (x + (1 - b1) * (z - x)).to(p.dtype)
                tensors |= {f"y.{name}": _copy(y), f"x.{name}": _copy(x)}
        return tensors

    def _state(self) -> dict[str, Tensor]:
        # As saved: the wrapper's own state is only there beside its base's.
        saved = self.optimizer.state_dict()["state"]
        return {
            f"state.{key}.{name}": _copy(value)
            for index, (name, p) in enumerate(self._parameters())
            for key, value in saved.get(index, {}).items()
            if isinstance(value, Tensor) and value.shape == p.shape
        }

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                yield self._names[p], p

    def _groups(self) -> list[dict[str, Any]]:
        return [
            {
                **{k: _plain(v) for k, v in group.items() if k != "param_names"},
                "b1": _beta(self.optimizer, group),
                "z_dtype": self._z_dtype(group),
                "params": [self._names[p] for p in group["params"]],
            }
            for group in self.optimizer.param_groups
        ]

    def _z_dtype(self, group: Mapping[str, Any]) -> str | None:
        """What the state is kept in; None before the first step."""
        for p in group["params"]:
            if "z" in (state := self.optimizer.state.get(p) or {}):
                return str(state["z"].dtype).removeprefix("torch.")
        return None

    def _write(
        self, kind: str, info: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        if self._file is None or self._file.closed:
            raise RuntimeError(
                "nothing is being recorded. Use it inside "
                "`with sf_torch.record(optimizer, path) as recorder:`."
            )
        try:
            self._file.write(self._frame(kind, info, tensors))
            # Out of this process: it may be killed at any time.
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self.path} could not take step {self.step}, and is readable up to "
                f"the one before: {error}",
            ) from error

    def _frame(
        self, kind: str, info: Mapping[str, Any], tensors: dict[str, Tensor]
    ) -> bytes:
        frame = {"kind": kind, "step": self.step, **info, "groups": self._groups()}
        metadata = {"frame": json.dumps(frame)}
        blob = _safetensors().save(tensors, metadata)
        if (size := _JSON.unpack_from(blob)[0]) > MOST_JSON:
            raise ValueError(
                f"the names and options of a frame take {size} bytes, and a record "
                f"holds up to {MOST_JSON}. Record an optimizer over fewer parameters."
            )
        length = _LENGTH.pack(len(blob), zlib.crc32(blob))
        return length + _SUM.pack(zlib.crc32(length)) + blob


def record(
    optimizer: Any,
    path: str | os.PathLike[str],
    every: int = 1,
    *,
    model: torch.nn.Module | None = None,
) -> Recorder:
    """Records a run, so that ``sf-parity replay`` can check it against JAX.

    Works with the optimizers of this package and of Meta's ``schedulefree``, in an
    ordinary loop that stays as it is. Each step is written at once; no more than one
    step's tensors are held. For parameters that lie whole in one process.

    Args:
      optimizer: as it trains. What it holds when the block begins is where the replay
        starts.
      path: the file to write; replaced, once the block begins, if it exists.
      every: steps from one recorded y and x to the next. Gradients are recorded at
        every step, since a replay needs them all.
      model: to name the parameters by; else they are named as the optimizer's groups
        do, or ``0.0``, ``0.1`` (group, place).

    Returns:
      A context manager. Its ``evaluated()`` notes the weights that you evaluate.

    Raises:
      ValueError: ``every`` that is not a positive integer, or a parameter that is not
        the model's, or is sharded over processes, or has the name of another.
      OSError: the file cannot be written, from the block's begin or a step.
      ImportError: safetensors is not installed.

    Examples:
      >>> import tempfile, torch, sf_torch
      >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
      >>> optimizer = sf_torch.AdamWScheduleFree([w], lr=0.1)
      >>> optimizer.train()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = f"{folder}/run.safetensors"
      ...     with sf_torch.record(optimizer, path):
      ...         for _ in range(2):
      ...             optimizer.zero_grad()
      ...             w.square().sum().backward()
      ...             optimizer.step()
      ...     frames = list(sf_torch.read_record(path))
      >>> [frame.kind for frame in frames]
      ['start', 'step', 'step']
      >>> frames[1].named("grad")
      {'0.0': tensor([ 6., -4.])}
    """
    return Recorder(optimizer, path, every, model)


def read_record(path: str | os.PathLike[str]) -> Iterator[Frame]:
    """The frames of a recorded run, one at a time, up to the last whole one.

    Raises:
      ValueError: the file holds no recorded run, or is damaged or malformed; then once
        the frames before the damage have been given.
    """
    last = None
    with open(path, "rb") as file:
        while (blob := _next_blob(file, path, last)) is not None:
            try:
                frame = _frame(blob)
            except Exception as error:  # as many kinds as there are ways to be wrong
                raise ValueError(
                    f"{path} is malformed in {_place(last)}: "
                    f"{type(error).__name__}: {error}. Record the run again."
                ) from error
            if last is None:
                if frame.kind != "start" or frame.info.get("format") != FORMAT:
                    break
            elif frame.kind == "start" or frame.step != last + (frame.kind == "step"):
                raise ValueError(
                    f"{path} has step {frame.step} after step {last}: two processes "
                    "have recorded to it. Give each a path of its own."
                )
            last = frame.step
            yield frame
    if last is None:
        raise ValueError(
            f"{path} holds no run of format {FORMAT}. Give the file that "
            "sf_torch.record wrote."
        )


def _next_blob(
    file: IO[bytes], path: str | os.PathLike[str], last: int | None
) -> bytes | None:
    header = file.read(_LENGTH.size + _SUM.size)
    if len(header) < _LENGTH.size + _SUM.size:
        return None
    packed = header[: _LENGTH.size]
    length, crc = _LENGTH.unpack(packed)
    whole = _SUM.unpack(header[_LENGTH.size :])[0] == zlib.crc32(packed)
    if whole:
        # Not read before it is known to be there: a header can be made up.
        if length > os.fstat(file.fileno()).st_size - file.tell():
            return None
        begin = file.read(min(length, _JSON.size))
        if len(begin) == _JSON.size and _JSON.unpack(begin)[0] <= MOST_JSON:
            file.seek(-len(begin), os.SEEK_CUR)
            blob = file.read(length)
            if zlib.crc32(blob) == crc:
                return blob
    if last is None and not whole:
        return None  # another kind of file
    raise ValueError(
        f"{path} is damaged in {_place(last)}; those before it are whole. Record the "
        "run again, or give a copy of the file."
    )


def _place(last: int | None) -> str:
    return "its first frame" if last is None else f"the frame after step {last}"


def _frame(blob: bytes) -> Frame:
    """The frame in a blob; an exception of any kind where it holds none."""
    tensors = _safetensors().load(blob)  # looks at the structure of the JSON, too
    (length,) = _JSON.unpack_from(blob)
    header = json.loads(blob[8 : 8 + length], object_pairs_hook=_named_once)
    info = json.loads(header["__metadata__"]["frame"], object_pairs_hook=_named_once)
    kind, step = info.pop("kind"), info.pop("step")
    if kind not in _KINDS or type(step) is not int:
        raise ValueError(f"there is no frame of kind {kind!r} and step {step!r}")
    return Frame(kind, step, info, tensors)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an entry is there twice")
    return found


def _names(optimizer: Any, model: torch.nn.Module | None) -> dict[Tensor, str]:
    known = {p: name for name, p in model.named_parameters()} if model else {}
    names = {}
    for i, group in enumerate(optimizer.param_groups):
        given: Iterable[str] = group.get("param_names") or (
            f"{i}.{j}" for j in range(len(group["params"]))
        )
        for p, name in zip(group["params"], given, strict=True):
            if model and p not in known:
                raise ValueError(
                    f"the optimizer moves a parameter of shape {tuple(p.shape)} that "
                    "is not the model's. Pass the model that it was built over."
                )
            names[p] = known.get(p, name)
    if len(set(names.values())) < len(names):
        raise ValueError(
            "two parameters of the optimizer have the same name. Name them apart where "
            "you give names to its groups, or pass model=."
        )
    return names


def _beta(optimizer: Any, group: Mapping[str, Any]) -> float:
    """β, which formed the present y."""
    if "b1" in group:
        return float(group["b1"])
    if "betas" in group and not hasattr(optimizer, "base"):
        return float(group["betas"][0])
    # The wrapper's own; "momentum" in its groups is the base optimizer's.
    return float(getattr(optimizer, "momentum", group.get("momentum", 0.0)))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _plain(value: Any) -> Any:
    """For JSON."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "recording needs safetensors, which is not installed: pip install "
            "safetensors, or this package with its extra [record]."
        ) from error
    return safetensors.torch
