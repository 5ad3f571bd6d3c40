"""Draws images/xyz.png: x, y and z of Schedule-Free SGD in a valley.

python docs/pictures.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
CURVATURE = np.array([1.0, 8.0])
LR, BETA, STEPS = 0.08, 0.75, 60


def paths() -> dict[str, np.ndarray]:
    """The rule as it stands, with weights that are all alike."""
    rng = np.random.default_rng(3)
    x = y = z = np.array([-4.0, 1.6])
    found = {"z": [z], "y": [y], "x": [x]}
    for k in range(STEPS):
        z = z - LR * (CURVATURE * y + rng.normal(size=2) * [1, 6])
        x = x + (z - x) / (k + 1)
        y = (1 - BETA) * z + BETA * x
        for name, point in (("z", z), ("y", y), ("x", x)):
            found[name].append(point)
    return {name: np.array(points) for name, points in found.items()}


def main() -> None:
    figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
    across, up = np.meshgrid(np.linspace(-4.6, 1.6, 200), np.linspace(-2, 2.2, 200))
    ax.contour(
        across,
        up,
        CURVATURE[0] * across**2 + CURVATURE[1] * up**2,
        levels=np.array([0.3, 1, 2.5, 5, 9, 14, 20, 30]),
        colors="#d5d9df",
        linewidths=0.8,
    )
    looks = {"z": ("#b9bec6", 1.0), "y": ("#e2621b", 1.4), "x": ("#3b6fd4", 2.2)}
    means = {
        "z": "z: the base optimizer",
        "y": "y: gradients are taken here",
        "x": "x: evaluate and ship this",
    }
    for name, points in paths().items():
        colour, width = looks[name]
        ax.plot(*points.T, color=colour, lw=width, label=means[name])
        ax.plot(*points[-1], "o", color=colour, ms=5)
    ax.plot(0, 0, "+", color="black", ms=9)
    ax.set(xticks=[], yticks=[], xlabel="first weight", ylabel="second weight")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(HERE / "images" / "xyz.png", dpi=150)


if __name__ == "__main__":
    main()
