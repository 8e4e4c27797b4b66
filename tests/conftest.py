"""Settings all tests share."""

import os

# Two test processes on two cores are slower with two threads each; and no test may wait for a network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
