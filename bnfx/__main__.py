"""`python -m bnfx`."""

import sys

from bnfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
