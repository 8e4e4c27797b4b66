"""``python -m hf_sai``: the ``hf-sai`` command."""

import sys

from hf_sai.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
