"""The small-scale study: every claim of the method tried on generated pictures, with models of 1 to 3 M parameters."""
