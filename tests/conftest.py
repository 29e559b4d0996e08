"""Set before torch is imported: waiting threads sleep instead of spinning, so that a busy machine tests as fast."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
