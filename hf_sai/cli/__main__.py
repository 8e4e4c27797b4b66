"""``python -m hf_sai.cli``: the ``hf-sai`` command for launchers that take a module (``torchrun -m hf_sai.cli``)."""

import sys

from hf_sai.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
