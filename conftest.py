"""Settings shared by tests/, parity_tests/ and the doctests.

They must be in place before JAX starts, which is why they stand at the root and
are set on import.
"""

import atexit
import os
import shutil
import tempfile

# Tests are about the CPU unless told otherwise: JAX_PLATFORMS=cuda make test.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A Matplotlib that never looks for a display.
os.environ.setdefault("MPLBACKEND", "Agg")
# Without a GPU the fused kernel of sf_torch runs in Triton's interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Sharding tests want a mesh; eight virtual devices make one on any machine.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
# Tests compile the same programs again and again, in several processes at that.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# xdist's workers would otherwise fight over the cores with one thread pool each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# No deadline: the first example of a property compiles. In CI a run must give the
# same answer twice; at a desk new examples are welcome.
hypothesis.settings.register_profile("desk", deadline=None, max_examples=50)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=25, derandomize=True
)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "desk")
)

# They have no examples that run by themselves, and importing them for doctests would
# import Lightning and Transformers, which are optional and take seconds.
collect_ignore = ["sf_torch/lightning.py", "sf_torch/transformers.py"]


@pytest.fixture
def ahead_of_time():
    """Without the cache: programs of devices that are not here cannot be read back."""
    import jax  # after the settings above

    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)
