"""Steps compiled for GPUs that need not be there, and what their kernels move.

``python tests/jax/gpu_steps.py`` prints the table of docs/benchmarks.md; `make gpu`
installs what that takes. The descriptions of the GPUs lie in ``gpus/``.
"""

import os

# Before JAX looks for a GPU that may not be there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
import math
import pathlib
import re
import sysconfig
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_steps import FAMILY, OPTIMIZERS, compile_step

DESCRIPTIONS = pathlib.Path(__file__).with_name("gpus")
GPUS = ("h100", "a100", "b200")
LEAF = 2**27
Shapes = tuple[tuple[int, ...], ...]
ONE_LEAF: Shapes = ((LEAF,),)
ALL = OPTIMIZERS | FAMILY
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
FORMS = {  # dtype of the parameters, and whether x is stored on request
    "lean": (jnp.float32, False),
    "stored": (jnp.float32, True),
    "bfloat16": (jnp.bfloat16, False),
}

# Names for memory; they launch nothing.
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_INSTRUCTION = re.compile(r"%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:, |$)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Kernel(NamedTuple):
    """One instruction of a compiled program that does something."""

    kind: str  # the instruction's name: "fusion", "copy", "all-reduce-start"
    result: str  # its shapes
    moved: int  # bytes: each operand read once, each result written once

    @property
    def on_numbers(self) -> bool:
        """Whether it makes a number or two, and no array."""
        return max(size for _, size in _arrays(self.result)) <= 2


class Program(NamedTuple):
    """A compiled step, as far as it is looked at."""

    kernels: list[Kernel]
    temporaries: int  # bytes
    in_place: int  # bytes of results that lie where an argument lay

    @property
    def over_arrays(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if not kernel.on_numbers]

    @property
    def over_numbers(self) -> list[Kernel]:
        return [kernel for kernel in self.kernels if kernel.on_numbers]

    @property
    def moved(self) -> int:
        """Bytes. XLA itself counts them for CPUs and TPUs only."""
        return sum(kernel.moved for kernel in self.kernels)


def _kernels(text: str) -> list[Kernel]:
    entry = text[text.index("\nENTRY") :].split("\n}")[0]
    shapes, found = {}, []
    for line in entry.splitlines():
        if match := _INSTRUCTION.search(line):
            name, shape, kind, operands = match.groups()
            shapes[name] = shape
            if kind not in _NO_KERNEL and not kind.endswith("-done"):
                read = re.findall(r"%([\w.\-]+)", operands)
                moved = sum(_bytes(shapes[r]) for r in read) + _bytes(shape)
                found.append(Kernel(kind, shape, moved))
    return found


def _arrays(shapes: str) -> list[tuple[str, int]]:
    """The dtype and the number of elements of each."""
    return [
        (dtype, math.prod(map(int, filter(None, dims.split(",")))))
        for dtype, dims in _ARRAY.findall(shapes)
    ]


def _bytes(shapes: str) -> int:
    return sum(BYTES[dtype] * size for dtype, size in _arrays(shapes))


def prepare() -> None:
    """Tells XLA where the CUDA compiler is; before JAX starts."""
    cuda = pathlib.Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
    flags = f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["PATH"] = f"{cuda / 'bin'}:{os.environ['PATH']}"


@functools.cache
def mesh_of(gpu: str, count: int) -> Mesh:
    shape = f"1x1x{count}"
    description = topologies.get_topology_desc(
        platform="cuda",
        topology_name=shape,
        target_config=(DESCRIPTIONS / f"{gpu}.txtpb").read_text(),
        topology=shape,
    )
    return Mesh(np.array(description.devices), "d")


def compile_for_gpu(
    tx: optax.GradientTransformation,
    shapes: Shapes = ONE_LEAF,
    dtype: jax.typing.DTypeLike = jnp.float32,
    gpu: str = GPUS[0],
    count: int = 1,
) -> Program:
    """The step over leaves of these shapes; on several GPUs, cut along their rows."""
    mesh = mesh_of(gpu, count)

    def sharding(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        cut = leaf.ndim and leaf.shape[0] % count == 0
        return NamedSharding(mesh, PartitionSpec("d") if cut else PartitionSpec())

    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    compiled = compile_step(tx, leaves, sharding)
    memory = compiled.memory_analysis()
    return Program(
        _kernels(compiled.as_text()),
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
    )


@functools.cache
def member(
    name: str, form: str, gpu: str = GPUS[0], shapes: Shapes = ONE_LEAF, count: int = 1
) -> Program:
    """The step of a member of the family."""
    dtype, store_x = FORMS[form]
    tx = ALL[name].make(store_x=store_x)
    return compile_for_gpu(tx, shapes, dtype, gpu, count)


def table() -> str:
    """A row for each optimizer: the float32 arrays that one leaf's step moves."""
    lines = [
        ["H100, one leaf", *FORMS, "kernels"],
        ["---", *["--:"] * (len(FORMS) + 1)],
    ]
    for name in ALL:
        programs = [member(name, form) for form in FORMS]
        arrays = [f"{program.moved / 4 / LEAF:.2f}" for program in programs]
        lines.append([name, *arrays, str(len(programs[0].over_arrays))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


if __name__ == "__main__":
    prepare()
    print(table(), end="")
