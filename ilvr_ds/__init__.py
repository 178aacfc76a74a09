"""Interleaved Latent Visual Reasoning: training with DeepSpeed, from records to checkpoints.

Open `ilvr_ds/contracts.py` first: it holds the data that flows through the package, in flow order.
"""

__version__ = "0.1.0"
