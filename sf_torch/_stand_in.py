"""Lets ``import schedulefree`` give this package, whose classes have those names."""

import sys
from collections.abc import Iterator
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from os import PathLike
from types import ModuleType
from typing import Any

NAME = "schedulefree"
VERSION = "1.4.1"  # whose names and arguments are here


def replace_schedulefree() -> None:
    """From now on ``import schedulefree`` gives this package's optimizers.

    For programs that import ``schedulefree`` themselves, whether or not it is
    installed: Hugging Face's ``TrainingArguments(optim="schedule_free_adamw")``, say.
    They are told version 1.4.1, by ``__version__`` and ``importlib.metadata``. Call it
    before ``import transformers``, which may look for the package only once.

    Examples:
      ``sf_torch.replace_schedulefree()``, then ``transformers.TrainingArguments(...,
      optim="schedule_free_adamw")``.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.modules.pop(NAME, None)
        sys.meta_path.insert(0, _Finder())


class _Finder(DistributionFinder, Loader):
    """Answers ``import`` and ``importlib.metadata``, for one name."""

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname == NAME else None

    def exec_module(self, module: ModuleType) -> None:
        import sf_torch

        public = {name: getattr(sf_torch, name) for name in sf_torch.__all__}
        module.__dict__.update(public, __all__=sf_torch.__all__, __version__=VERSION)

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        if context is not None and context.name == NAME:
            yield _Published()


class _Published(Distribution):
    """What ``importlib.metadata`` knows of an installed package."""

    def read_text(self, filename: str) -> str | None:
        known = {"METADATA": f"Name: {NAME}\nVersion: {VERSION}\n"}
        return known.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Any:
        raise FileNotFoundError(f"{path}: sf_torch stands in for {NAME}.")
