"""Compiles the fused kernels for GPUs that need not be there, and counts in PTX.

``python tests/torch/ptx.py sm_90 float32`` prints what it counted of every kernel that
a member of the family launches over such parameters, a line of JSON each. A program of
its own: in the process of the tests Triton interprets.

All that tests of compiled kernels know of how sf_torch makes its step stands here:
which kernel is launched from :mod:`sf_torch._step.fused`, and what its constants mean.
"""

import json
import re
import subprocess
import sys
import tempfile
from itertools import product
from unittest import mock

import torch
import triton
from members import MEMBERS, OVER_A_BASE, build
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sf_torch._step import fused as launcher
from sf_torch._step.fused import BLOCK

THREADS = 4 * 32  # Triton's default, four warps
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
KERNELS = {"step_kernel": launcher.step_kernel}
POINTERS = {torch.int64: "*i64", torch.float64: "*fp64"}


class Recorder:
    """Stands in for a kernel: notes what it is launched with, and launches nothing."""

    def __init__(self, name, seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, enable_fp_fusion, **constants):
        assert enable_fp_fusion  # as it is compiled below
        kernel = KERNELS[self.name]
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        fixed = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        types = {
            p.name: kind(given[p.name]) for p in kernel.params if p.name not in fixed
        }
        launched = (self.name, tuple(types.items()), tuple(fixed.items()))
        if launched not in self.seen:
            self.seen.append(launched)


def kind(argument):
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    return "i32" if isinstance(argument, int) else "fp32"


def launched_by(names, dtypes, aligned=True):
    """Every kernel, with its constants, that these members launch."""
    seen = []
    recorders = {name: Recorder(name, seen) for name in KERNELS}
    with (
        mock.patch.multiple(launcher, **recorders),
        # Else the kernels are not for the CPU. They are compiled all the same: whether
        # to interpret is settled when a kernel is defined.
        mock.patch.object(triton.knobs.runtime, "interpret", True),
    ):
        for name, dtype in product(names, dtypes):
            ones = torch.ones(32 if aligned else 33, dtype=DTYPES[dtype])
            p = torch.nn.Parameter(ones)
            optimizer = build(name, [p], fused=True)
            p.grad = torch.ones_like(p)
            optimizer.step(lambda: 1.0)
    return seen


def compiled(launched, target):
    name, types, fixed = launched
    kernel = KERNELS[name]
    names, fixed = kernel.arg_names, dict(fixed)
    types = dict(types) | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(k),): v for k, v in fixed.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name].startswith("*")
        },
    )
    options = {"enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def facts(launched, target):
    kernel = compiled(launched, target)
    # Under a mask: the others are addresses and numbers, the same for all threads.
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(
            r"@%p\d+ (?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"]
        )
    ]
    registers, stack = usage(kernel.asm["cubin"])
    return {
        **described(launched),
        "bytes": sum(widths) * THREADS / BLOCK,
        "narrowest": min(widths),
        "registers": registers,
        "stack": stack,
    }


def described(launched):
    """The kernel, and what it has to move of each element."""
    fixed = dict(launched[2])
    rows = [row for row in "XYVM" if fixed[f"{row}_ROW"] >= 0]
    width = fixed["PARAM"].primitive_bitwidth // 8
    # y lies between x and z, where these are stored: only a decay at y reads it then.
    reads_y = "X" not in rows or (fixed["DECAY_AT"] == "y" and not fixed["MASTER"])
    moved = width * (1 + reads_y) + width  # and the gradient
    moved += 2 * 4 + sum(4 if row == "Y" else 2 * 4 for row in rows)
    parts = ["z", *rows, str(fixed["PARAM"])]
    if fixed["DECAY_AT"]:
        parts.append(f"decay at {fixed['DECAY_AT']}")
    kernel = ", ".join(parts).lower()
    return {"kernel": kernel, "least": moved, "aligned": fixed["ALIGNED"]}


def usage(cubin):
    """Registers a thread, and bytes of stack, where registers are spilled to."""
    program = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--dump-resource-usage", file.name]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    return [
        int(re.search(rf"{key}:(\d+)", found.stdout)[1]) for key in ("REG", "STACK")
    ]


def main(words):
    dtypes = [word for word in words if word in DTYPES]
    fused = [name for name in MEMBERS if name not in OVER_A_BASE]
    launched = launched_by(fused, dtypes)
    launched += launched_by(["AdamWScheduleFree"], dtypes, aligned=False)
    for architecture in (word for word in words if word not in DTYPES):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        for each in launched:
            print(json.dumps({"architecture": architecture, **facts(each, target)}))


if __name__ == "__main__":
    main(sys.argv[1:])
