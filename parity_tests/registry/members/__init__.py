"""One module an optimizer, each with an ``OPTIMIZER`` and its ``CASES``."""
