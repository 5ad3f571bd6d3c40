"""Compiles the fused kernels for a GPU that need not be there, and counts in PTX.

``python tests/ptx.py`` prints, for each kernel of :data:`KERNELS`, the bytes that it
moves an element, the narrowest access to an array, and its stack. A program of its
own: in the process of the tests Triton interprets.
"""

import json
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sf_torch._step.launch import BLOCK, ROWS
from sf_torch._step.triton_kernels import TYPES, step_kernel, switch_kernel

THREADS = 4 * 32  # Triton's default, four warps
H100 = GPUTarget("cuda", 90, 32)


def step(rows, dtype=torch.float32, aligned=True):
    """The step over these rows of the table."""
    numbered = {
        f"{short}_ROW": rows.index(row) if row in rows else -1
        for short, row in zip(("PARAM", "Z", "X", "Y", "V", "M"), ROWS, strict=True)
    }
    return compiled(
        step_kernel,
        {
            **dict.fromkeys(("table", "grads", "blocks"), "*i64"),
            "numbers": "*fp64",
            "n": "i32",
        },
        SIZE_ROW=len(rows),
        PARAM=TYPES[dtype],
        GRAD=TYPES[dtype],
        MASTER=dtype != torch.float32,
        DECAY_AT="y",
        DECAY_MOVES_X=False,
        ALIGNED=aligned,
        **numbered,
    )


def switch(to_x):
    numbers = {"n": "i32", "z_in_x": "fp32", "z_in_y": "fp32"}
    signature = {"table": "*i64", "blocks": "*i64", **numbers}
    return compiled(switch_kernel, signature, TO_X=to_x, ALIGNED=True)


def compiled(kernel, signature, **constants):
    constants["BLOCK"] = BLOCK
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: types[name] for name in names},
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name].startswith("*")
        },
    )
    return triton.compile(source, target=H100)


def facts(kernel):
    ptx = kernel.asm["ptx"]
    # Under a mask: the others are addresses and numbers, the same for all threads.
    widths = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(
            r"@%p\d+ (?:ld|st)\.global(?:\.v(\d))?\.b(\d+)", ptx
        )
    ]
    return {
        "bytes": sum(widths) * THREADS / BLOCK,
        "narrowest": min(widths),
        "stack": stack(kernel.asm["cubin"]),
    }


def stack(cubin):
    """Bytes a thread, where registers are spilled to."""
    program = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


ADAMW = ("param", "z", "exp_avg_sq")
KERNELS = {
    "sgd": lambda: step(("param", "z")),
    "adamw": lambda: step(ADAMW),
    "adamw_momentum": lambda: step((*ADAMW, "exp_avg")),
    "adamw_bfloat16": lambda: step(("param", "z", "x", "exp_avg_sq"), torch.bfloat16),
    "adamw_unaligned": lambda: step(ADAMW, aligned=False),
    "to_x": lambda: switch(True),
    "to_y": lambda: switch(False),
}

if __name__ == "__main__":
    json.dump({name: facts(kernel()) for name, kernel in KERNELS.items()}, sys.stdout)
