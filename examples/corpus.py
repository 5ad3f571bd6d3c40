"""Text to train on that is on every machine: the standard library's own source."""

import os
from pathlib import Path

import numpy as np

VOCABULARY = 256  # a token is a byte


def load(limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation bytes: whole files, every tenth one for validation.

    Args:
      limit: how many files to read; None for all of them.
    """
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:limit]
    texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in files]
    validation = texts[9::10]
    training = [text for i, text in enumerate(texts) if i % 10 != 9]
    return np.concatenate(training), np.concatenate(validation)


def batch(text: np.ndarray, size: int, length: int, seed: int, step: int) -> np.ndarray:
    """Windows of length + 1 bytes, (size, length + 1); the step alone decides which.

    A resumed run thus sees the batches that it would have seen, and need not save a
    data loader's position.
    """
    starts = np.random.default_rng([seed, step]).integers(len(text) - length, size=size)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)
