"""Muon as a base for ScheduleFreeWrapper, in any precision, with or without rows.

    m  = μ m + (1 - μ) g
    P  = O(m), or O(μ m + (1 - μ) g) with Nesterov     O: Newton-Schulz
    p' = (1 - lr λ) p - lr s P                         s by the matrix's shape

NorMuon divides each row of P, which is what enters one output neuron, by its size so
far, and gives the whole the size of an AdamW step:

    v  = b2 v + (1 - b2) mean(P², by row),  P̂ = P / (sqrt(v) + eps)
    p' = (1 - lr λ) p - lr 0.2 sqrt(rows columns) P̂ / |P̂|

References:
  Jordan et al., *Muon: An optimizer for hidden layers in neural networks*,
    https://kellerjordan.github.io/posts/muon
  Liu et al., *Muon is Scalable for LLM Training*, https://arxiv.org/abs/2502.16982
  Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
  Apte et al., *Anytime Training with Schedule-Free Spectral Optimization*,
    https://arxiv.org/abs/2605.23061
"""

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from sf_torch import _arguments


def _original(rows: int, columns: int) -> float:
    return sqrt(max(1.0, rows / max(1, columns)))


SCALES: dict[str | None, Callable[[int, int], float]] = {
    None: _original,
    "original": _original,
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
}


class Muon(torch.optim.Optimizer):
    r"""``torch.optim.Muon`` with a choice of precision, and NorMuon.

    .. math::

        m' &= \mu m + (1 - \mu) g \\
        p' &= (1 - lr \, \lambda) p - lr \, s \, O(m')

    with O Newton-Schulz's iteration; under ``nesterov`` it is taken of
    :math:`\mu m' + (1 - \mu) g`.

    Args:
      params: matrices or groups of them, as for any torch optimizer.
      lr: step size.
      weight_decay: λ, decoupled and times the learning rate.
      momentum: μ, in [0, 1).
      nesterov: look one step ahead with the momentum.
      ns_coefficients: a, b and c of the iteration X' = a X + (b A + c A²) X, A = X Xᵀ.
      eps: the least norm that m is divided by; with ``row_b2`` also added to sqrt(v).
      ns_steps: iterations.
      adjust_lr_fn: s. "original" (or None): sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 sqrt(max(rows, columns)). NorMuon has a size of its own.
      ns_dtype: dtype of the iteration; None for that of the parameter, which is
        float32 or wider inside a wrapper.
      row_b2: decay rate of v, in [0, 1), for NorMuon; None for Muon.

    By default it is ``torch.optim.Muon``, whose state dict it loads.

    Raises:
      ValueError: an argument out of its range, or a parameter that is no real matrix.
      TypeError: ``ns_steps`` that is not a whole number.

    Examples:
      >>> import torch, sf_torch
      >>> w = torch.nn.Parameter(torch.eye(3))
      >>> base = sf_torch.bases.Muon([w], lr=0.05, weight_decay=0.0, row_b2=0.95)
      >>> optimizer = sf_torch.ScheduleFreeWrapper(base, momentum=0.9)
      >>> optimizer.train()
      >>> for _ in range(400):
      ...     optimizer.zero_grad()
      ...     w.square().sum().backward()
      ...     optimizer.step()
      >>> bool(optimizer.eval_params()[0].norm() < 0.2)
      True

    References:
      Li et al., *NorMuon*, https://arxiv.org/abs/2510.05491
    """

    _kinds = _arguments.OF_MUON

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: torch.dtype | None = torch.bfloat16,
        row_b2: float | None = None,
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "row_b2": row_b2,
        }
        _arguments.check("params", params)
        _arguments.options(options, self._kinds)
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _arguments.options(self.param_groups[-1], self._kinds)
            _check_matrices(self.param_groups[-1]["params"])
        except Exception:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # A state dict of torch.optim.Muon lacks the two options that are new.
            options = {**self.defaults, **group}
            lr = float(options["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction, scale = _direction(p.grad, self.state[p], options)
                if options["weight_decay"]:
                    # Not times 1 - lr λ, whose rounding is the same at every step.
                    p.add_(p, alpha=-lr * options["weight_decay"])
                p.add_(direction, alpha=-lr * scale)
        return loss


def _direction(
    grad: Tensor, state: dict[str, Any], options: Mapping[str, Any]
) -> tuple[Tensor, float]:
    """The direction of the step and its factor. Moves the moments in ``state``."""
    mu, b2, eps = (options[name] for name in ("momentum", "row_b2", "eps"))
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros_like(grad)
    m = state["momentum_buffer"].lerp_(grad, 1 - mu)
    p = orthogonalise(
        grad.lerp(m, mu) if options["nesterov"] else m,
        options["ns_coefficients"],
        options["ns_steps"],
        eps,
        options["ns_dtype"],
    )
    if b2 is None:
        return p, SCALES[options["adjust_lr_fn"]](*p.shape)
    if "row_exp_avg_sq" not in state:
        state["row_exp_avg_sq"] = torch.zeros_like(grad[:, :1])
    p = p.to(grad.dtype)
    mean = p.square().sum(1, keepdim=True) / max(1, p.size(1))
    v = state["row_exp_avg_sq"].lerp_(mean, 1 - b2)
    p = p / (v.sqrt() + eps)
    return p / p.norm().clamp(min=eps), 0.2 * sqrt(p.numel())


def orthogonalise(
    m: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Nearly U Vᵀ, where m = U S Vᵀ: Newton-Schulz brings S close to 1, not to 1."""
    a, b, c = coefficients
    x = m.to(dtype or m.dtype)
    tall = x.size(0) > x.size(1)
    if tall:  # the smaller of X Xᵀ and Xᵀ X
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, factor, x, beta=a)
    return x.T if tall else x


def _check_matrices(params: list[Tensor]) -> None:
    for p in params:
        if p.ndim != 2 or not p.is_floating_point():
            raise ValueError(
                f"a parameter has shape {tuple(p.shape)} and dtype {p.dtype}, and Muon "
                "takes real matrices. Give the others to AdamW: "
                "CombinedOptimizer(Muon(...), AdamW(...))."
            )
