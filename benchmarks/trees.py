"""Trees of parameters to step: their shapes, and what they are called."""

import dataclasses
import math

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tree:
    """Shapes of the parameters, all of one dtype."""

    shapes: tuple[Shape, ...]
    dtype: str = "float32"
    name: str = ""
    each: str = ""

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        kind = "" if self.dtype == "float32" else f", {self.dtype}"
        count = len(self.shapes)
        tensors = "1 tensor" if count == 1 else f"{count:,} tensors"
        name = f"{self.name}: " if self.name else ""
        return f"{name}{tensors}{self.each}, {_short(self.size)} parameters{kind}"


def one(size: int, dtype: str = "float32") -> Tree:
    return Tree(((size,),), dtype)


def many(count: int, size: int) -> Tree:
    return Tree(((size,),) * count, each=f" of {size // 1024}K")


def gpt2(width: int = 768, dtype: str = "float32") -> Tree:
    """GPT-2 small's 148 tensors; with a smaller width, the same number of them."""
    block: tuple[Shape, ...] = (
        (width,),
        (width,),  # the first normalisation
        (width, 3 * width),
        (3 * width,),  # queries, keys and values
        (width, width),
        (width,),
        (width,),
        (width,),  # the second normalisation
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    )
    shapes = ((50257, width), (1024, width), *(block * 12), (width,), (width,))
    scaled = "" if width == 768 else f" at 1/{768 // width} of its width"
    return Tree(tuple(shapes), dtype, f"GPT-2 small{scaled}")


def _short(number: int) -> str:
    for unit, suffix in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{suffix}"
    return str(number)
