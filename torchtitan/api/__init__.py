"""The public functions and classes of `import torchtitan`; see docs/guides/python.md."""
