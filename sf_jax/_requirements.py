"""Says what is missing where jax and optax cannot be found.

JAX and optax come with an extra, so that a program of one framework does not install
the other. ``__init__`` imports this module before all others.
"""

from importlib import metadata

try:
    import jax  # noqa: F401
    import optax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in {"jax", "optax"}:
        raise  # installed, but something that it imports is missing
    raise ModuleNotFoundError(
        f"sf_jax needs jax and optax, and {error.name} is not installed: pip install "
        "jax optax, or this package with its extra [jax].",
        name=error.name,
    ) from error


def version() -> str:
    """The version of the installed distribution. pyproject.toml is where it is written.

    A source tree that was put on the path without installing it has none.
    """
    try:
        return metadata.version("schedulefree-jax")
    except metadata.PackageNotFoundError:
        return "0+source"
