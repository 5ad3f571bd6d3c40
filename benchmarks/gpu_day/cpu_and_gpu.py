"""The same steps on the CPU and on the device, within each framework.

How far y, x and z are apart at their worst, in units of 2^-23 · max(1, max|w|); each is
held to the float64 reference by the parity parts. JAX computes products of matrices at
precision "highest", PyTorch in float32 without TF32. Exit status 1 where a float32 case
parts by more than the tolerance table grants to two packages.
"""

from benchmarks.gpu_day.writing import arguments, table

VOICES = {"jax": "jax scan", "torch": "torch"}


def main() -> int:
    device, out = arguments(__doc__)
    from parity_tests.compare import tolerances
    from parity_tests.compare.distance import compare
    from parity_tests.registry import CASES
    from parity_tests.runners.voices import run, unsupported

    chosen = [case for case in CASES if case.thorough and case.dtype == "float32"]
    chosen += [case for case in CASES if case.name == "adamw/network"]
    steps = None if device == "cuda" else 5
    rows, wrong = [], False
    for case in chosen if device == "cuda" else chosen[:1]:
        for framework, voice in VOICES.items():
            there = "gpu" if (framework, device) == ("jax", "cuda") else device
            if unsupported(case, voice, there):
                continue
            distance = compare(
                run(case, voice, steps, there),
                run(case, voice, steps, "cpu"),
                case.dtype,
            )
            limit = tolerances.limit(case.dtype, "sf_jax", "torch", "cpu")
            wrong |= distance.ulps > limit.ulps
            rows.append(
                {
                    "case": case.name,
                    "framework": framework,
                    "apart": str(distance),
                    "limit": limit.ulps,
                }
            )
    title = f"CPU and {device}, worst distance in units of 2^-23 max(1, max|w|)."
    table(out, f"{title} Precision of products: highest, no TF32.", rows)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
