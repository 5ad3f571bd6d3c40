"""Says what is missing where torch cannot be found.

PyTorch comes with an extra, so that a program of one framework does not install the
other. ``__init__`` imports this module before all others.
"""

from importlib import metadata

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise  # installed, but something that it imports is missing
    raise ModuleNotFoundError(
        "sf_torch needs torch, which is not installed: pip install torch, or "
        "this package with its extra [torch].",
        name="torch",
    ) from error


def version() -> str:
    """The version of the installed distribution. pyproject.toml is where it is written.

    A source tree that was put on the path without installing it has none.
    """
    try:
        return metadata.version("schedulefree-jax")
    except metadata.PackageNotFoundError:
        return "0+source"
