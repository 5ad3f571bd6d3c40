"""Of a PyTorch state nothing wrong gets in: refused by name, all in one message."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

import sf_jax
from sf_jax.torch_checkpoint import Leaf, from_torch, guess_names, to_torch

PARAMS = {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}
ROWS = [Leaf("weight", "kernel", (1, 0)), Leaf("bias", "bias")]
TX = sf_jax.schedule_free_adamw(0.1)
NAN = float("nan")


def good():
    def moved(shape):
        return {"z": np.ones(shape, "float32"), "exp_avg_sq": np.ones(shape, "float32")}

    return {
        "model": {
            "weight": np.zeros((3, 2), "float32"),
            "bias": np.zeros(3, "float32"),
        },
        "state": {0: moved((3, 2)), 1: moved(3)},
        "group": {
            "params": [0, 1],
            "train_mode": True,
            "k": 5,
            "weight_sum": 0.05,
            "lr_max": 0.1,
            "betas": (0.9, 0.999),
            "r": 0.0,
            "weight_lr_power": 2.0,
        },
    }


def port(parts, **options):
    optimizer = {"state": parts["state"], "param_groups": [parts["group"]]}
    return from_torch(
        parts["model"], optimizer, PARAMS, TX.init(PARAMS), names=ROWS, **options
    )


def put(*where):
    *path, key, value = where

    def change(parts):
        for step in path:
            parts = parts[step]
        if isinstance(value, str) and value == "gone":
            del parts[key]
        else:
            parts[key] = value

    return change


def holes(value, shape=3, dtype="float32"):
    array = np.ones(shape, dtype)
    array.flat[-1] = value
    return array


IMPOSSIBLE = {
    "k=-1": (put("group", "k", -1), "k of group 0 is -1, not a whole number"),
    "k=2.5": (put("group", "k", 2.5), "k of group 0 is 2.5, not a whole number"),
    "k=text": (put("group", "k", "7"), "k of group 0 is '7'"),
    "W=1e300": (put("group", "weight_sum", 1e300), "add up to a weight_sum of 1e.300"),
    "W=NaN": (put("group", "weight_sum", NAN), "weight_sum of group 0 is nan"),
    "W<0": (put("group", "weight_sum", -1.0), "weight_sum of group 0 is -1"),
    "lr_max": (put("group", "lr_max", NAN), "lr_max of group 0 is nan"),
    "betas": (put("group", "betas", (2, 0.9)), r"betas\[0\] of group 0 is 2"),
    "one beta": (put("group", "betas", 0.9), "betas of group 0 is 0.9, not a pair"),
    "r": (put("group", "r", NAN), "r of group 0 is nan"),
    "train_mode": (put("group", "train_mode", 1), "train_mode of group 0 is 1"),
    "no z": (put("state", 1, "z", "gone"), "missing: z of bias, beside exp_avg_sq"),
    "no state": (put("state", 1, "gone"), "missing: the state of bias.*unmoved="),
    "empty state": (put("state", 1, {}), "missing: the state of bias.*unmoved="),
    "no moment": (put("state", 1, "exp_avg_sq", "gone"), "missing: exp_avg_sq of bias"),
    "v<0": (put("state", 1, "exp_avg_sq", holes(-1)), "exp_avg_sq of bias has 1 negat"),
    "v=NaN": (put("state", 1, "exp_avg_sq", holes(NAN)), "of bias has 1 values that"),
    "z=inf": (put("state", 1, "z", holes(np.inf)), "z of bias has 1 values that are"),
    "y=NaN": (put("model", "bias", holes(NAN)), "bias has 1 values that are not fin"),
    "complex z": (put("state", 1, "z", holes(1, dtype="complex64")), "z is complex64"),
    "complex v": (
        put("state", 1, "exp_avg_sq", holes(1, dtype="complex64")),
        "of bias is complex64, and a mean of squares is real",
    ),
    "complex y": (
        put("model", "bias", holes(1, dtype="complex64")),
        "bias is complex64, bias float32",
    ),
    "missed": (put("state", 1, "missed", 9), "missed of bias is 9, of 5 steps"),
    "missed=-1": (put("state", 1, "missed", -1), "missed of bias is -1, of 5 steps"),
}


@pytest.mark.parametrize(
    ("change", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys()
)
def test_what_no_run_can_hold_is_refused_by_name(change, message):
    parts = good()
    port(parts)
    change(parts)
    with pytest.raises(ValueError, match=message):
        port(parts)


def test_all_of_it_stands_in_one_message():
    parts = good()
    put("group", "weight_sum", 1e300)(parts)
    put("state", 0, "exp_avg_sq", holes(-1, (3, 2)))(parts)
    put("model", "weight", holes(NAN, (3, 2)))(parts)
    put("state", 1, "gone")(parts)
    said = r"(?s)weight_sum of 1e.*weight has.*exp_avg_sq of weight.*the state of bias"
    with pytest.raises(ValueError, match=said):
        port(parts)


def test_a_parameter_that_has_not_moved_is_named():
    parts = good()
    parts["model"]["bias"] += 2
    del parts["state"][1]
    run = port(parts, unmoved=["bias"])
    np.testing.assert_array_equal(run.opt_state.z["bias"], [2, 2, 2])
    assert not run.opt_state.base_state.nu["bias"].any()
    with pytest.raises(ValueError, match="a state of weight, which is in unmoved"):
        port(parts, unmoved=["bias", "weight"])
    with pytest.raises(ValueError, match="unknown: basi in unmoved"):
        port(parts, unmoved=["basi"])


KINDS = {
    "z=None": (put("state", 1, "z", None), r"\['state'\]\[1\]\['z'\] must be a tensor"),
    "z=text": (put("state", 1, "z", "ones"), r"\['z'\] must be a tensor.*'ones'"),
    "z=number": (put("state", 1, "z", 1.0), r"\['z'\] must be a tensor"),
    "v=object": (
        put("state", 1, "exp_avg_sq", object()),
        r"\['exp_avg_sq'\] must be a",
    ),
    "y of objects": (
        put("model", "bias", np.array([None] * 3)),
        r"model\['bias'\] .*obj",
    ),
    "y of text": (put("model", "bias", np.array(["a"] * 3)), r"model\['bias'\] .*<U1"),
    "a number for a name": (put("model", 7, np.ones(3)), "model has the key 7"),
    "a number for a key": (put("state", 1, 7, np.ones(3)), r"\[1\] has the key 7"),
    "state=None": (put("state", 1, None), r"\['state'\]\[1\] must be a mapping"),
    "states=list": (put("state", [1]), r"optimizer\['state'\] must be a mapping"),
    "params=None": (put("group", "params", None), r"\['params'\] must be a list"),
    "params=tensors": (put("group", "params", [np.ones(3)]), r"\['params'\] has array"),
    "no params": (put("group", "params", "gone"), "has no 'params'"),
    "params twice": (put("group", "params", [0, 0]), "has parameter 0 again"),
    "another's state": (put("state", 7, {}), r"\['state'\]\[7\] is of a parameter"),
    "group=None": (put("group", None), r"\['param_groups'\]\[0\] must be a mapping"),
    "model=None": (put("model", None), "model must be a mapping, got None"),
}


@pytest.mark.parametrize(("change", "message"), KINDS.values(), ids=KINDS.keys())
def test_what_is_no_tensor_or_no_name_is_refused_by_its_place(change, message):
    parts = good()
    change(parts)
    with pytest.raises((ValueError, TypeError), match=message):
        port(parts)
    # The way back takes the same dicts, as templates.
    run = port(good())
    optimizer = {"state": parts["state"], "param_groups": [parts["group"]]}
    with pytest.raises((ValueError, TypeError), match=message):
        to_torch(run.params, run.opt_state, parts["model"], optimizer, names=ROWS)


@pytest.mark.parametrize("optimizer", [None, [], {}, {"state": {}}])
def test_what_is_no_state_dict_is_refused(optimizer):
    with pytest.raises((ValueError, TypeError), match=r"optimizer (must be|has no)"):
        from_torch(good()["model"], optimizer, PARAMS, TX.init(PARAMS), names=ROWS)


def test_names_are_guessed_of_names_and_tensors_only():
    with pytest.raises(TypeError, match="model has the key 0"):
        guess_names({0: np.ones(3)}, PARAMS)


def test_params_that_only_broadcast_against_z_are_refused():
    state = TX.init(PARAMS)
    narrow = {"kernel": jnp.zeros((1, 3)), "bias": jnp.zeros(1)}
    with pytest.raises(ValueError, match="shape"):
        sf_jax.eval_params(state, narrow)
    with pytest.raises(ValueError, match="shape"):
        sf_jax.train_params(state, narrow)
    with pytest.raises(ValueError, match="shape"):
        TX.update(copy.copy(narrow), state, narrow)
