"""Muon, and NorMuon, which also normalises each row of the step.

References:
  Jordan et al., *Muon*, https://kellerjordan.github.io/posts/muon
  Liu et al., *Muon is Scalable for LLM Training*, https://arxiv.org/abs/2502.16982
  Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
  Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
    https://arxiv.org/abs/2605.23061 (NorMuon under Schedule-Free)
"""

from math import sqrt

import numpy as np

from parity_tests.reference.base_steps import AdamW


def orthogonalised(m: np.ndarray, eps: float) -> np.ndarray:
    """m with its singular values brought near 1, by five Newton-Schulz iterations.

    X = m / (|m| + eps), then five times X = a X + b (X Xᵀ) X + c (X Xᵀ)² X.
    """
    x = m / (np.linalg.norm(m) + eps)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x


class Muon(AdamW):
    """u = -lr_k (D + λ p) for matrices. Other leaves take AdamW's, without momentum.

    m = μ m + (1 - μ) g
    P = orthogonalised(m), or with Nesterov
        orthogonalised(μ m / (1 - μ^(k+2)) + (1 - μ) g / (1 - μ^(k+1)))
    D = 0.2 sqrt(max(rows, columns)) P

    With ``row_b2`` (NorMuon), where a row holds the weights into one output neuron:

    v = row_b2 v + (1 - row_b2) mean of P² over the row
    P̂ = P / (sqrt(v) + eps)
    D = 0.2 sqrt(rows columns) P̂ / |P̂|
    """

    def __init__(
        self,
        b2: float,
        eps: float,
        weight_decay: float,
        decay_at: str,
        momentum: float,
        nesterov: bool,
        row_b2: float | None,
    ) -> None:
        super().__init__(b2, eps, weight_decay, decay_at)
        self.momentum, self.nesterov, self.row_b2 = momentum, nesterov, row_b2

    def direction(self, n: str, g: np.ndarray, k: int) -> np.ndarray:
        if g.ndim != 2:
            return super().direction(n, g, k)
        mu, b2 = self.momentum, self.row_b2
        m = self.m[n] = mu * self.m.get(n, 0.0) + (1 - mu) * g
        if self.nesterov:
            m = mu * m / (1 - mu ** (k + 2)) + (1 - mu) * g / (1 - mu ** (k + 1))
        p = orthogonalised(m, self.eps)
        if b2 is None:
            return 0.2 * sqrt(max(p.shape)) * p
        mean = np.mean(p**2, axis=1, keepdims=True)
        self.v[n] = b2 * self.v.get(n, 0.0) + (1 - b2) * mean
        p = p / (np.sqrt(self.v[n]) + self.eps)
        return 0.2 * sqrt(p.size) * p / np.linalg.norm(p)
