"""Peak memory of a step against what its arrays take.

A lean step needs parameters, gradients, z and the moments, and nothing beside: what is
left over at the peak is a temporary. Exit status 1 where that is an array or more.
"""

from benchmarks.candidates import CANDIDATES
from benchmarks.gpu_day.writing import arguments, table
from benchmarks.runners import Jax, Torch
from benchmarks.trees import one

# Of AdamW's state, z and v, in bytes a parameter; in bfloat16 x too, all in float32.
STATE = {"float32": 8, "bfloat16": 12}


def main() -> int:
    device, out = arguments(__doc__)
    size = 2**27 if device == "cuda" else 2**12
    rows, wrong = [], False
    for candidate in CANDIDATES:
        if candidate.name not in ("sf_torch", "sf_jax"):
            continue
        for dtype, state in STATE.items():
            runner_of = {"torch": Torch, "jax": Jax}[candidate.framework]
            place = (
                "gpu" if candidate.framework == "jax" and device == "cuda" else device
            )
            runner = runner_of(candidate, one(size, dtype), place)
            extra = runner.extra_bytes
            rows.append(
                {
                    "": candidate.name,
                    "dtype": dtype,
                    "state B/param": runner.state_bytes / size,
                    "should be": state,
                    "beyond at the peak, B/param": None
                    if extra is None
                    else extra / size,
                }
            )
            wrong |= round(runner.state_bytes / size, 2) != state
            # XLA on CPUs needs a copy of z: docs/benchmarks.md.
            wrong |= device == "cuda" and (extra or 0) >= 2 * size
            del runner
    table(out, "AdamW over one tensor; PyTorch on CPUs does not tell its peak.", rows)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
