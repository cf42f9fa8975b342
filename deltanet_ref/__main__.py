"""python -m deltanet_ref: the command line."""

import sys

from deltanet_ref.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
