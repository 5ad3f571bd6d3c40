"""What is run on the day when there is a GPU: a table of parts. A new one is one row.

Each is a program of its own, so that one that crashes, or fills the device's memory,
takes nothing else with it.
"""

import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Cases of the registry, a part each: patterns that name every case once.
PARITY = {
    "sgd": "s*",
    "adamw": "adamw/*",
    "adamw-variants": "adamw_*",
    "radam-refined": "r*",
    "wrapper": "w*",
    "family": "[!sarw]*",
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A program, what it shows, and what it takes to run it."""

    name: str
    what: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()  # packages
    environment: tuple[tuple[str, str], ...] = ()


def parts(on_gpu: bool, out: Path) -> list[Part]:
    """In the order in which they run. Off a GPU the same, in sizes for a rehearsal.

    Args:
      on_gpu: False for a CPU.
      out: what a part writes goes to the folder of its name there.
    """
    device, torch_device = ("gpu", "cuda") if on_gpu else ("cpu", "cpu")

    def tests(name: str, what: str, *arguments: str, jax: str = "cpu") -> Part:
        command = (sys.executable, "-m", "pytest", "-q", "-rs", *arguments)
        return Part(
            name, what, command, ("pytest", "hypothesis"), (("JAX_PLATFORMS", jax),)
        )

    def program(
        name: str, what: str, *arguments: str, needs: tuple[str, ...] = ()
    ) -> Part:
        command = (sys.executable, *arguments)
        return Part(name, what, command, needs)

    def parity(name: str, pattern: str) -> Part:
        short = "warmup" if name == "adamw-variants" else "plain"
        cases = pattern if on_gpu else f"{pattern.removesuffix('/*')}/{short}"
        size = () if on_gpu else ("--steps", "3")
        return program(
            f"parity-{name}",
            f"parity matrix, cases {pattern}: JAX and PyTorch on the device, the "
            "reference on the CPU",
            *("-m", "parity_tests", "matrix", "--device", device, "--case", cases),
            *(*size, "--report", str(out / f"parity-{name}")),
            needs=("rich", "jinja2", "matplotlib", "schedulefree", "prodigyopt"),
        )

    def benchmark(experiment: str, what: str) -> Part:
        size = ("--compile-limit", "60") if on_gpu else ("--smoke",)
        return program(
            f"benchmark-{experiment}",
            what,
            *("-m", "benchmarks", "--device", torch_device, "--only", experiment),
            *(*size, "--out", str(out / f"benchmark-{experiment}")),
            needs=("rich", "matplotlib"),
        )

    def module(name: str, what: str) -> Part:
        at = str(out / name)
        file = f"benchmarks.gpu_day.{name.replace('-', '_')}"
        return program(name, what, "-m", file, "--device", torch_device, "--out", at)

    sizes = ("small", "medium") if on_gpu else ("smoke",)
    fused = "tests/torch/test_torch_fused.py"
    return [
        tests(
            "fused",
            "the fused step against the plain one",
            *(fused, *(() if on_gpu else ("-k", "sgd"))),
        ),
        tests(
            "fused-members",
            "the fused step of every member, plans kept and renewed",
            *(
                "tests/torch/test_torch_fused_members.py",
                "tests/torch/test_torch_plans.py",
            ),
            *(() if on_gpu else ("-k", "SGDScheduleFree")),
        ),
        tests("graphs", "CUDA graphs of the step", fused, "-k", "cuda_graph"),
        tests(
            "one-pass",
            "the JAX step, compiled for this device: kernels, bytes, temporaries",
            *("tests/jax/test_jax_one_pass.py", *(() if on_gpu else ("-k", "sgd"))),
            jax="cuda" if on_gpu else "cpu",
        ),
        benchmark("steps", "step times: four trees, against the floor and peers"),
        benchmark("leaves", "step times over the number of tensors"),
        benchmark("parameters", "step times over the number of parameters"),
        module("memory", "peak memory of a step against what its arrays take"),
        module(
            "compiled", "the step under torch.compile: as far as from the plain one"
        ),
        module("cpu-and-gpu", "the same steps on CPU and device, in each framework"),
        *(parity(name, pattern) for name, pattern in PARITY.items()),
        *(
            program(
                f"anytime-{size}",
                f"one Schedule-Free run against tuned cosines, size {size}",
                *("examples/anytime.py", "--out", str(out / f"anytime-{size}")),
                *(("--size", size) if size != "smoke" else ("--smoke",)),
                needs=("matplotlib",),
            )
            for size in sizes
        ),
    ]
