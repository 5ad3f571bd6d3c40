"""What each chip holds while a model of 7 billion parameters takes a step.

    make tpu                                # installs libtpu
    python -m benchmarks.sharded_memory

Compiles the update ahead of time for a TPU v5p slice, on a machine without one, and
prints the compiler's own report: arguments (parameters, state and gradients), which
the step overwrites in place, and temporaries. The last column is what `jit(tx.init)`
puts on a chip when it is told nothing but the shardings of the parameters.
"""

import os

# libtpu would otherwise look for the machine it runs on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sf_jax

TOPOLOGY = "v5p:2x2x2"
MESH = {"fsdp": 4, "tensor": 2}
GIB = 2**30

# Shape and layout of each leaf: Llama's 7B, its 32 layers stacked as under nn.scan.
LAYERS, WIDTH, HIDDEN, VOCABULARY = 32, 4096, 11008, 32000
INTO = P(None, "fsdp", "tensor")
OUT_OF = P(None, "tensor", "fsdp")
LEAVES: dict[str, tuple[tuple[int, ...], P]] = {
    "embedding": ((VOCABULARY, WIDTH), P("tensor", "fsdp")),
    "query": ((LAYERS, WIDTH, WIDTH), INTO),
    "key": ((LAYERS, WIDTH, WIDTH), INTO),
    "value": ((LAYERS, WIDTH, WIDTH), INTO),
    "out": ((LAYERS, WIDTH, WIDTH), OUT_OF),
    "gate": ((LAYERS, WIDTH, HIDDEN), INTO),
    "up": ((LAYERS, WIDTH, HIDDEN), INTO),
    "down": ((LAYERS, HIDDEN, WIDTH), OUT_OF),
    "attention_norm": ((LAYERS, WIDTH), P()),
    "mlp_norm": ((LAYERS, WIDTH), P()),
    "final_norm": ((WIDTH,), P()),
    "logits": ((WIDTH, VOCABULARY), P("fsdp", "tensor")),
}

OPTIMIZERS = {
    "optax.adamw": optax.adamw(1e-3, weight_decay=0.1),
    "schedule_free_adamw": sf_jax.schedule_free_adamw(1e-3, weight_decay=0.1),
    "schedule_free_adamw, store_x": sf_jax.schedule_free_adamw(
        1e-3, weight_decay=0.1, store_x=True
    ),
}
ROWS = [
    ("optax.adamw", jnp.float32),
    ("schedule_free_adamw", jnp.float32),
    ("schedule_free_adamw, store_x", jnp.float32),
    ("optax.adamw", jnp.bfloat16),
    ("schedule_free_adamw", jnp.bfloat16),
]
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)"
)


def abstract_params(mesh: Mesh, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in LEAVES.items()
    }


def placed_state(tx: Any, params: dict[str, jax.ShapeDtypeStruct]) -> Any:
    """The state's shapes, each leaf with the sharding of its parameter."""
    (mesh,) = {param.sharding.mesh for param in params.values()}

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        name = getattr(path[-1], "key", None)
        sharding = params[name].sharding if name in params else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map_with_path(place, jax.eval_shape(tx.init, params))


def report(mesh: Mesh) -> Iterator[dict[str, Any]]:
    """One row per optimizer: GiB on each chip."""
    for name, dtype in ROWS:
        tx, params = OPTIMIZERS[name], abstract_params(mesh, dtype)

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        compiled = jitted.lower(params, placed_state(tx, params), params).compile()
        memory: Any = compiled.memory_analysis()
        init: Any = jax.jit(tx.init).lower(params).compile().memory_analysis()
        yield {
            "optimizer": name,
            "parameters": jnp.dtype(dtype).name,
            "arguments": memory.argument_size_in_bytes / GIB,
            "in place": memory.alias_size_in_bytes / GIB,
            "temporaries": memory.temp_size_in_bytes / GIB,
            "collectives": len(COLLECTIVE.findall(str(compiled.as_text()))),
            "state after jit(tx.init)": init.output_size_in_bytes / GIB,
        }


def main() -> None:
    chips = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = Mesh(np.array(chips).reshape(tuple(MESH.values())), tuple(MESH))
    count = sum(int(np.prod(shape)) for shape, _ in LEAVES.values())
    print(f"{count / 1e9:.2f} billion parameters, {TOPOLOGY}, mesh {MESH}")
    print("GiB on each chip:\n")
    for i, row in enumerate(report(mesh)):
        if not i:
            print("| " + " | ".join(row) + " |")
            print("|---|---" + "|--:" * (len(row) - 2) + "|")
        cells = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values())
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
