"""A PyTorch-native pretraining library driven by a TOML: change the mesh, keep the run."""

__version__ = "0.1.0"
