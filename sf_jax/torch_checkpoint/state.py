"""What a PyTorch optimizer's ``state_dict`` says, and tensors without torch.

Tensors are only asked for their values and for new ones like themselves; NumPy arrays
may stand in for them everywhere.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from sf_jax.torch_checkpoint.entries import array_problems, group_problems
from sf_jax.torch_checkpoint.names import first_names

# Whatever a state keeps beside the moments: the iterates (y is also the parameter's
# own value) and torch's count of steps, which is the group's k.
IMPLIED = {"x", "y", "z", "step"}
# Steps of its group in which a parameter of sf_torch had no gradient.
MISSED = "missed"
_SHOWS = 2.0**-24  # what is smaller does not show beside 1 in float32
_ROUNDINGS = 4  # between an x or a y that was saved and the same worked out here
_BUFFERS = {"running_mean", "running_var", "num_batches_tracked"}
_CAST = {  # NumPy's name of a dtype, and the method of a tensor that casts to it
    "bfloat16": "bfloat16",
    "float16": "half",
    "float32": "float",
    "float64": "double",
    "complex64": "cfloat",
    "complex128": "cdouble",
}


@dataclass(frozen=True)
class Scalars:
    """What a parameter group remembers of its steps, and a Schedule-Free state too."""

    k: int
    weight_sum: float
    lr_max: float
    b1: float | None  # None: the group does not tell
    r: float | None
    weight_lr_power: float | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> "Scalars":
        b1 = group.get("b1")  # what the present y was formed with
        if b1 is None and "betas" in group and "train_mode" in group:
            b1 = group["betas"][0]
        # A group without a mode is that of Meta's wrapper, where momentum is the base
        # optimizer's.
        if b1 is None and "train_mode" in group:
            b1 = group.get("momentum")
        return cls(
            k=int(group.get("k", 0)),
            weight_sum=float(group.get("weight_sum", 0.0)),
            lr_max=max(float(group.get("lr_max", 0.0)), 0.0),  # starts at -1
            b1=_float(b1),
            r=_float(group.get("r")),
            weight_lr_power=_float(group.get("weight_lr_power")),
        )

    def powers(self) -> tuple[float, float]:
        """r and weight_lr_power, by default where the group does not tell them."""
        r = 0.0 if self.r is None else self.r
        return r, 2.0 if self.weight_lr_power is None else self.weight_lr_power

    def unit(self, k: int, lr_max: float) -> float:
        """What W is divided by in JAX and not in PyTorch: the weight of the last step.

        1 where PyTorch divides too, in both packages by the same rule: where one of
        the weight's factors lies beyond ``2^±500``.

        Args:
          k: steps taken, at least 1.
          lr_max: as the JAX state has it, rounded.
        """
        r, power = self.powers()
        lr_max = lr_max if lr_max > 0 else 1.0  # no step has had a weight by it
        if max(abs(r * math.log2(k)), abs(power * math.log2(lr_max))) > 500:
            return 1.0
        return float(k) ** r * lr_max**power

    def ratio(self, lr_max: float) -> float:
        """``W / w``, what the JAX state holds."""
        return self.weight_sum / self.unit(max(self.k, 1), lr_max)

    def problems(self) -> Iterator[str]:
        """What speaks against the sum of weights."""
        r, power = self.powers()
        # So many weights, of which none is larger than the last.
        most = self.k * (1 + 1e-5) if min(r, power) >= 0 else math.inf
        if not self.weight_sum or 1 - 1e-5 <= self.ratio(self.lr_max) <= most:
            return
        problem = (
            f"different: {self.k} steps of r = {r:g} and weight_lr_power = {power:g} "
            f"do not add up to a weight_sum of {self.weight_sum:g}"
        )
        if self.r is None or self.weight_lr_power is None:
            problem += (
                ". The optimizer's param_groups do not tell both: write them into these"
            )
        yield problem


@dataclass(frozen=True)
class Parameter:
    """A parameter that a PyTorch optimizer moves, with what is kept for it."""

    name: str
    scalars: Scalars
    param: np.ndarray
    at_x: bool  # whether param is x and not y
    state: Mapping[str, np.ndarray]

    def y(self, b1: float) -> np.ndarray:
        if not self.at_x or "z" not in self.state:
            return self.param
        formed = form_y(self.state.get("x", self.param), self.state["z"], b1)
        kept = self.state.get("y")  # exact, unless it is left over from another step
        return formed if kept is None or not near(kept, formed, self.param) else kept

    def get(self, key: str, b1: float) -> np.ndarray | None:
        """State by PyTorch's key; None where it is missing and cannot be made."""
        if key in self.state:
            return self.state[key]
        if "z" not in self.state:  # no gradient so far: x, y and z are one
            return self.param if key in IMPLIED else np.zeros_like(self.param)
        if key == "x" and (self.at_x or b1 > 0):
            y, z = widen(self.param), widen(self.state["z"])
            return self.param if self.at_x else y + (1 - b1) / b1 * (y - z)
        return None


def form_y(x: Any, z: Any, b1: float) -> np.ndarray:
    """``y = x + (1 - β) (z - x)``, in double precision."""
    x, z = widen(np.asarray(x)), widen(np.asarray(z))
    return x + (1 - b1) * (z - x)


def near(a: Any, b: Any, param: Any) -> bool:
    """Whether two arrays are one but for rounding to the dtype of param."""
    a, b = widen(np.asarray(a)), widen(np.asarray(b))
    if a.shape != b.shape:
        return False
    size = max(np.abs(array).max(initial=0) for array in (a, b))
    eps = float(ml_dtypes.finfo(np.asarray(param).dtype).eps)
    return bool((np.abs(a - b) <= _ROUNDINGS * eps * size).all())


def what_it_holds(
    param: np.ndarray, state: Mapping[str, np.ndarray], b1: float | None
) -> str | None:
    """Which of x and y param is by its state: "x", "y", "" for neither, None: unknown.

    A file may join a model at x with an optimizer in train mode, or the other way
    round: modes say what the optimizer last did, and not what the model was saved as.
    """
    x, y, z = (state.get(key) for key in ("x", "y", "z"))
    known = [array for array in (x, y, z) if array is not None]
    if z is None or len(known) < 2 or any(a.shape != param.shape for a in known):
        return None
    is_x = x is not None and np.array_equal(param, x.astype(param.dtype))
    is_y = y is not None and np.array_equal(param, y.astype(param.dtype))
    if b1 is not None and x is not None:
        is_y = is_y or near(param, form_y(x, z, b1), param)
    elif b1 is not None:
        is_x = near(form_y(param, z, b1), y, param)
    if is_x and is_y:  # as after one step
        return None
    if is_x or is_y:
        return "x" if is_x else "y"
    # A y that is left over from another step shows nothing; a stored x is this step's.
    return "" if b1 is not None and x is not None else None


def read_parameters(
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    param_names: Sequence[str] | None,
    model_holds: str | None,
    unmoved: Collection[str],
    problems: list[str],
) -> dict[str, Parameter]:
    """The optimizer's parameters by name; what is wrong with them into problems."""
    if model_holds not in (None, "y", "x"):
        raise ValueError(
            f"model_holds must be 'y', 'x' or None, got {model_holds!r}. It says which "
            "of the sequences the model's parameters are."
        )
    order = name_order(model, optimizer, param_names, problems)
    parameters, unknown = {}, False
    problems += [f"unknown: {name} in unmoved" for name in {*unmoved} - {*model}]
    for i, group in enumerate(optimizer["param_groups"]):
        impossible = list(group_problems(i, group))
        problems += impossible
        if impossible:
            continue
        scalars, by_mode = Scalars.of(group), None
        problems += scalars.problems()
        if "train_mode" in group:
            by_mode = "y" if group["train_mode"] else "x"
        for index in group["params"]:
            if (name := order.get(index)) is None:
                continue
            param = to_numpy(model[name])
            saved = optimizer["state"].get(index, {})
            state = {
                key: to_numpy(value)
                for key, value in saved.items()
                if value is not None  # SGD's buffer where it has no momentum
                and key != MISSED
            }
            problems += _count_problems(name, saved, group)
            for key, value in (("", param), *state.items()):
                problems += array_problems(name, key, value)
            problems += [
                f"different: {key} is {value.dtype} and {name} {param.dtype}"
                for key, value in state.items()
                if key != "exp_avg_sq"
                and np.iscomplexobj(value)
                and not np.iscomplexobj(param)
            ]
            moments = sorted(state.keys() - IMPLIED)
            if moments and "z" not in state:
                problems.append(f"missing: z of {name}, beside {', '.join(moments)}")
            problems += [
                f"misshapen: {key} {value.shape} of {name} {param.shape}; is the "
                "optimizer's order another? (param_names=)"
                for key, value in state.items()
                if key != "step" and value.shape != param.shape
            ]
            shown = what_it_holds(param, state, scalars.b1)
            if shown == "" and model_holds is None:
                problems.append(
                    f"different: {name} is neither x nor y of the optimizer's state, "
                    "so that the two are of different moments"
                )
            if shown and model_holds not in (None, shown):
                problems.append(
                    f"different: {name} is {shown} by the optimizer's state, and "
                    f"model_holds={model_holds!r}"
                )
            holds = model_holds or shown or by_mode
            unknown |= holds is None and "z" in state
            parameters[name] = Parameter(name, scalars, param, holds == "x", state)
    if unknown:
        problems.append(
            "the state dict does not say whether the parameters are y or x: pass "
            "model_holds="
        )
    started = any(optimizer["state"].values())
    have_z = {name for name, p in parameters.items() if "z" in p.state}
    if started and not have_z:
        problems.append("no z in the optimizer's state: it is no Schedule-Free one")
    elif started:
        problems += [
            f"missing: the state of {name}. If it has had no gradient so far, pass "
            "its name in unmoved="
            for name, p in parameters.items()
            if not p.state and name not in unmoved
        ]
    problems += [
        f"left over: a state of {name}, which is in unmoved"
        for name in unmoved
        if name in have_z
    ]
    return parameters


def _count_problems(
    name: str, state: Mapping[str, Any], group: Mapping[str, Any]
) -> list[str]:
    """Refuses a parameter whose bias is corrected by another count than its group's.

    JAX corrects the bias of every leaf by the one count of its state. Where no decay
    rate to the power of the parameter's own count shows beside 1 in float32, the two
    counts correct alike, at this step and at all later ones.
    """
    missed, k = state.get(MISSED, 0), int(group.get("k", 0))
    if not 0 <= missed <= k or missed % 1:
        return [f"impossible: {MISSED} of {name} is {missed}, of {k} steps"]
    missed = int(missed)
    # With upstream_compatible it has the group's count.
    if not missed or group.get("upstream_compatible") or "betas" not in group:
        return []
    b1, b2 = group["betas"]
    decay = max(b2, group.get("inner_momentum", b1) if "exp_avg" in state else 0.0)
    if decay ** (k - missed) <= _SHOWS:
        return []
    enough = math.ceil(math.log(_SHOWS) / math.log(decay))
    return [
        f"different: {name} had no gradient in {missed} of {k} steps, and PyTorch "
        f"corrects its bias by the {k - missed} that it took. JAX corrects that of "
        f"all leaves by the {k} of their state. Go on in PyTorch until it has taken "
        f"{enough}, from where both corrections are 1 to rounding; or delete "
        f"{MISSED!r} from its state to have it corrected by {k} from now on"
    ]


def name_order(
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    param_names: Sequence[str] | None,
    problems: list[str],
) -> dict[int, str]:
    """The names of the optimizer's parameters by their index."""
    groups = optimizer["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if param_names is not None:
        names = list(param_names)
    elif all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    elif len(groups) == 1:
        names = [
            name
            for name, first in first_names(model).items()
            if name == first and name.rpartition(".")[2] not in _BUFFERS
        ]
    else:
        problems.append(
            f"the optimizer has {len(groups)} groups and no names: pass param_names=, "
            "group after group"
        )
        return {}
    if len(names) != len(indices):
        problems.append(
            f"the optimizer has {len(indices)} parameters, for {len(names)} names: "
            f"{', '.join(names)}; pass param_names= in the optimizer's order"
        )
        return {}
    tensors = first_names(model)
    problems += [f"unknown: {n} in param_names" for n in names if n not in tensors]
    return {i: n for i, n in zip(indices, names, strict=True) if n in tensors}


def common_scalars(
    parameters: Sequence[Parameter], problems: list[str]
) -> Scalars | None:
    """What one Schedule-Free state can hold of several groups, if they agree."""
    by_value: dict[Scalars, list[str]] = {}
    for parameter in parameters:
        by_value.setdefault(parameter.scalars, []).append(parameter.name)
    if len(by_value) > 1:
        problems.append(
            "one Schedule-Free state for groups that differ: "
            + "; ".join(f"{names} with {value}" for value, names in by_value.items())
            + ". Give each a transformation with optax.partition"
        )
    return next(iter(by_value)) if len(by_value) == 1 else None


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def to_numpy(tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    if hasattr(tensor, "full_tensor"):  # sharded
        tensor = tensor.full_tensor()
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # which NumPy does not know
        return np.asarray(tensor.float()).astype(ml_dtypes.bfloat16)
    return np.asarray(tensor)


def to_tensor(array: Any, like: Any, dtype: Any = None) -> Any:
    """A new tensor on the device of `like`, in its dtype unless told otherwise."""
    if not hasattr(like, "new_tensor"):
        return np.array(array, dtype or like.dtype)
    if dtype is not None:
        like = getattr(like.new_empty(0), _CAST[str(np.dtype(dtype))])()
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        array = array.astype(np.float32)
    return like.new_tensor(array)


def widen(array: np.ndarray) -> np.ndarray:
    """In double precision, real or complex."""
    return array.astype(np.result_type(array.dtype, np.float64))
