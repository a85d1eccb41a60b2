"""Tests of torchtitan."""

import os

# Before torch is imported, and inherited by what the tests start. They run side by side, and
# threads of OpenMP spin while one of them waits for a processor: greedy tokens of transformers
# took 15 times the processor time.
os.environ["OMP_NUM_THREADS"] = "1"
