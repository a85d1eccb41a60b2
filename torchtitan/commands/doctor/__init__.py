"""`torchtitan doctor`."""
