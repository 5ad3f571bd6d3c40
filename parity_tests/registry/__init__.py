"""The registry: every optimizer, and every case that it is run in.

Each module of :mod:`parity_tests.registry.members` has one optimizer: how the reference
and each framework build it, what it supports, and its option sets. A new file there is
all that the registry needs: the tests and the command line run what is in
:data:`CASES`. What a whole package can't run is in
:data:`parity_tests.registry.case.LACKS`.
"""

import importlib
import pkgutil

from parity_tests.registry import members
from parity_tests.registry.case import Case
from parity_tests.registry.optimizer import Optimizer

_MODULES = [
    importlib.import_module(f"{members.__name__}.{module.name}")
    for module in sorted(pkgutil.iter_modules(members.__path__), key=lambda m: m.name)
]

OPTIMIZERS: dict[str, Optimizer] = {
    module.OPTIMIZER.name: module.OPTIMIZER for module in _MODULES
}
CASES: tuple[Case, ...] = tuple(case for module in _MODULES for case in module.CASES)

__all__ = ["CASES", "OPTIMIZERS", "Case", "Optimizer"]
