"""What the registry knows of an optimizer, and what its members' modules share."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from optax import GradientTransformation

from parity_tests import reference
from parity_tests.reference import Seams
from parity_tests.registry.options import Options, function


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How the reference and each framework build an optimizer, and what it supports.

    ``torch`` and ``meta`` are called with parameter groups, each of which already holds
    its ``arguments``; the options of the first group; a form, which is "", "Reference"
    or "Closure" as in the names of the classes; and ``foreach``.
    """

    name: str
    reference: Callable[[Any], Seams]
    jax: Callable[[Any, bool], GradientTransformation]  # options, store_x
    arguments: Callable[[Any], dict[str, Any]]  # of a group in PyTorch
    torch: Callable[..., Any] | None = None
    meta: Callable[..., Any] | None = None
    optax: Callable[[Any], GradientTransformation] | None = None
    options: Callable[..., Any] = Options  # the class of its options
    torch_forms: tuple[str, ...] = ("", "Reference", "Closure")
    fuses: bool = True  # whether sf_torch has a fused kernel for it
    # package -> what must be installed for this optimizer besides the package itself
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # package -> feature of a case -> why this optimizer can't run it there
    lacks: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)
    # the PyTorch class, without its form, whose recorded runs `replay` checks with it
    replays: str = ""


def seams(o: Options, base: Any, step_size: Callable[[reference.Now], float]) -> Seams:
    """The seams of an optimizer with a β of its own and the polynomial average."""
    average = reference.PolynomialAverage(o.r, o.weight_lr_power)
    return Seams(function(o.b1), step_size, base, average)


def warmup(o: Options) -> Callable[[reference.Now], float]:
    """The reference's step size: lr with warmup."""
    return reference.warmup(function(o.lr), o.warmup_steps)


def pick(o: Options, names: str) -> dict[str, Any]:
    """The options of these names, for a framework that calls them the same."""
    return {name: getattr(o, name) for name in names.split()}


def changed(o: Options, names: str) -> dict[str, Any]:
    """Those of the options that are not at their default.

    For arguments that Meta's package does not have: it is given them only where a case
    needs them, and such cases are not run in it.
    """
    default = Options()
    return {n: v for n, v in pick(o, names).items() if v != getattr(default, n)}


def by_class(package: str, name: str) -> Callable[..., Any]:
    """Builds the package's class of this name and form.

    The package is imported when a case is run in it, so that it may be absent.
    """

    def build(groups: list[Any], o: Options, form: str, foreach: bool) -> Any:
        module = importlib.import_module(package)
        return getattr(module, name + form)(groups, foreach=foreach)

    return build
