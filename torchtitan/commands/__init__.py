"""The commands of `torchtitan`, a module each."""
