"""A candidate at work on a tree: made, stepped, timed, asked for its memory.

Times are those of a block of steps, divided by their number: CUDA is timed by its own
events, JAX by waiting for the result of the last step. Each step of a block follows
the one before it, so an accelerator's queue is full and the host's share shows only
where it is the slower of the two.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from benchmarks.candidates import Candidate
from benchmarks.trees import Tree


class Runner(Protocol):
    """What measuring needs of a framework."""

    first_seconds: float  # to compile, or for a first step that compiles and allocates
    state_bytes: int
    extra_bytes: int | None  # at the peak of a step, beyond what is there between steps

    def steps(self, count: int) -> float:
        """Seconds a step."""

    def evaluations(self) -> dict[str, Callable[[], float]]:
        """By name: what is done to look at x, each returning its seconds."""


class Torch(Runner):
    """A torch optimizer on its own parameters and gradients."""

    def __init__(self, candidate: Candidate, tree: Tree, device: str) -> None:
        import torch

        self.cuda = device == "cuda"
        generator = torch.Generator(device).manual_seed(0)
        options = {"dtype": getattr(torch, tree.dtype), "device": device}

        def draw(shape: Any) -> Any:
            return torch.randn(shape, generator=generator, **options)

        self.params = [torch.nn.Parameter(draw(shape)) for shape in tree.shapes]
        self.grads = [draw(shape) for shape in tree.shapes]
        self.optimizer = candidate.build(self.params)
        self._call("train")
        start = time.perf_counter()
        self.steps(1)
        self.first_seconds = time.perf_counter() - start
        self.state_bytes = sum(
            tensor.numel() * tensor.element_size()
            for tensor in _arrays(dict(self.optimizer.state), torch.Tensor)
        )
        self.extra_bytes = self._peak()

    def _peak(self) -> int | None:
        import torch

        if not self.cuda:
            return None
        self.steps(1)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.steps(1)
        return torch.cuda.max_memory_allocated() - before

    def _call(self, method: str) -> None:
        # torch.optim has no modes.
        getattr(self.optimizer, method, lambda: None)()

    def _refill(self) -> None:
        # HeavyBall takes the gradients away in every step.
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad

    def steps(self, count: int) -> float:
        def block() -> None:
            for _ in range(count):
                if self.params[0].grad is None:
                    self._refill()
                self.optimizer.step()

        return self._timed(block) / count

    def _timed(self, block: Callable[[], Any]) -> float:
        import torch

        if not self.cuda:
            start = time.perf_counter()
            block()
            return time.perf_counter() - start
        start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start_event.record()
        block()
        end.record()
        end.synchronize()
        return start_event.elapsed_time(end) / 1e3

    def evaluations(self) -> dict[str, Callable[[], float]]:
        found: dict[str, Callable[[], float]] = {}
        if hasattr(self.optimizer, "eval_params"):
            found["eval_params()"] = lambda: self._timed(self.optimizer.eval_params)
        if hasattr(self.optimizer, "eval"):
            found["eval() and train()"] = lambda: self._timed(self._there_and_back)
        return found

    def _there_and_back(self) -> None:
        self._call("eval")
        self._call("train")


class Jax(Runner):
    """An optax transformation in a jitted step, donated in the order returned."""

    def __init__(self, candidate: Candidate, tree: Tree, device: str) -> None:
        import jax
        import optax

        tx = candidate.build()
        self.eval_params = candidate.eval_params
        generator = np.random.default_rng(0)

        def draw(shape: Any) -> Any:
            values = generator.standard_normal(shape, dtype=np.float32)
            return jax.device_put(values, jax.devices(device)[0]).astype(tree.dtype)

        params = [draw(shape) for shape in tree.shapes]
        self.grads = [draw(shape) for shape in tree.shapes]
        with jax.default_device(jax.devices(device)[0]):
            state = jax.jit(tx.init)(params)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            # In the order of the arguments: see docs/benchmarks.md.
            return optax.apply_updates(params, updates), state

        start = time.perf_counter()
        self.step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(params, state, self.grads)
            .compile()
        )
        self.first_seconds = time.perf_counter() - start
        self.carry = (params, state)
        self.state_bytes = sum(leaf.nbytes for leaf in _arrays(state, jax.Array))
        memory = self.step.memory_analysis()
        self.extra_bytes = None if memory is None else memory.temp_size_in_bytes
        self.steps(1)

    def steps(self, count: int) -> float:
        import jax

        params, state = self.carry
        start = time.perf_counter()
        for _ in range(count):
            params, state = self.step(params, state, self.grads)
        jax.block_until_ready(params)
        seconds = time.perf_counter() - start
        self.carry = (params, state)
        return seconds / count

    def evaluations(self) -> dict[str, Callable[[], float]]:
        import jax

        if self.eval_params is None:
            return {}
        find_x = self.eval_params
        params, state = self.carry
        compiled = jax.jit(find_x).lower(state, params).compile()

        def timed() -> float:
            params, state = self.carry
            start = time.perf_counter()
            jax.block_until_ready(compiled(state, params))
            return time.perf_counter() - start

        return {"eval_params, jitted": timed}


class Floor:
    """An in-place add that reads and writes so many bytes: what memory allows.

    On an array of its own in float32, by whichever framework has the device.
    """

    name = "floor"

    def __init__(self, traffic: int, device: str, framework: str) -> None:
        self.traffic = traffic
        size = max(traffic // 8, 1)
        if framework == "torch":
            import torch

            array = torch.zeros(size, device=device)
            self._torch = Torch.__new__(Torch)
            self._torch.cuda = device == "cuda"
            self.steps = lambda count: (
                self._torch._timed(lambda: [array.add_(1) for _ in range(count)])
                / count
            )
        else:
            self.steps = _jax_add(size, device)
        self.steps(1)


def _jax_add(size: int, device: str) -> Callable[[int], float]:
    import jax
    import jax.numpy as jnp

    held = [jax.device_put(jnp.zeros(size), jax.devices(device)[0])]
    add = jax.jit(lambda a: a + 1, donate_argnums=0)

    def steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            held[0] = add(held[0])
        jax.block_until_ready(held[0])
        return (time.perf_counter() - start) / count

    return steps


@contextlib.contextmanager
def peers_warnings_aside(candidate: Candidate) -> Iterator[None]:
    """Ours stand; what other packages warn about is not this program's business."""
    with warnings.catch_warnings():
        if not candidate.ours:
            warnings.simplefilter("ignore")
        yield


def _arrays(node: Any, kind: type) -> Iterator[Any]:
    """Every array inside of more than a number."""
    if isinstance(node, kind):
        if getattr(node, "ndim", 0) > 0:
            yield node
    elif isinstance(node, dict):
        for child in node.values():
            yield from _arrays(child, kind)
    elif isinstance(node, (list, tuple)):
        for child in node:
            yield from _arrays(child, kind)
