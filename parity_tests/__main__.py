"""``python -m parity_tests``; the commands are in :mod:`parity_tests.cli`."""

import sys

from parity_tests.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
