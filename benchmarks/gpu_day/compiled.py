"""The step under torch.compile: the same numbers, and how long both take.

Exit status 1 where they part by more than eight roundings of float32.
"""

import copy
import time
from typing import Any

from benchmarks.gpu_day.writing import arguments, table
from benchmarks.trees import gpt2, many

STEPS, WITHIN = 5, 8 * 2.0**-24


def main() -> int:
    device, out = arguments(__doc__)
    import torch

    import sf_torch

    tree = gpt2() if device == "cuda" else many(2, 1024)
    generator = torch.Generator(device).manual_seed(0)

    def draw() -> list[Any]:
        return [
            torch.randn(shape, generator=generator, device=device)
            for shape in tree.shapes
        ]

    start, grads = draw(), [draw() for _ in range(2)]

    def train(compiles: bool) -> tuple[list[Any], float]:
        params = [torch.nn.Parameter(p) for p in copy.deepcopy(start)]
        optimizer = sf_torch.AdamWScheduleFree(params, lr=1e-3, weight_decay=0.1)
        optimizer.train()
        step = torch.compile(optimizer.step) if compiles else optimizer.step
        seconds = 0.0
        for k in range(STEPS):
            for p, g in zip(params, grads[k % 2], strict=True):
                p.grad = g
            begun = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begun  # the last one's
        return optimizer.eval_params(), seconds

    (plain, plain_s), (ours, compiled_s) = train(False), train(True)
    distance = max(
        float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
        for a, b in zip(ours, plain, strict=True)
    )
    row = {
        "tree": str(tree),
        "steps": STEPS,
        "largest distance of x, relative": distance,
        "plain ms": 1e3 * plain_s,
        "compiled ms": 1e3 * compiled_s,
    }
    table(out, "AdamW, plain (fused where it can be) and under torch.compile.", [row])
    return int(not distance <= WITHIN)


if __name__ == "__main__":
    raise SystemExit(main())
