"""A step goes one way through the files of sf_torch, so that it can be read in one go.

If a function of file A calls one of file B while a step is taken, none of B calls one
of A. The base class calls its seams, which stand in the classes of the members: those
files count as one. What a wrapper wraps is another optimizer, whose step is its own.
"""

import sys
from pathlib import Path

import pytest
from members import MEMBERS, build, parameters, run

import sf_torch

PACKAGE = Path(sf_torch.__file__).parent
CLASSES = "the classes"


def file_of(frame):
    """The file of sf_torch that a frame is in; None for others."""
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return None
    name = path.relative_to(PACKAGE).as_posix()
    if name.startswith("bases/"):
        return None
    is_class = name in ("_optimizer.py", "_iterates.py") or "_optimizers/" in name
    return CLASSES if is_class else name


def calls_of(walk):
    """Pairs of files of which the one calls the other."""
    pairs = set()

    def sees(frame, event, argument):
        callee = file_of(frame)
        if event != "call" or callee is None:
            return
        caller = frame.f_back
        while caller is not None and file_of(caller) is None:
            caller = caller.f_back
        if caller is not None and file_of(caller) != callee:
            pairs.add((file_of(caller), callee))

    before = sys.getprofile()
    sys.setprofile(sees)
    try:
        walk()
    finally:
        sys.setprofile(before)
    return pairs


@pytest.mark.parametrize("name", MEMBERS)
def test_calls_go_one_way(name):
    params = parameters([(3,), (40, 50)])
    optimizer = build(name, params)
    pairs = calls_of(lambda: run(optimizer, params, range(3)))
    assert (CLASSES, "_step/dispatch.py") in pairs
    assert not {pair for pair in pairs if pair[::-1] in pairs}
