"""Serving by `transformers serve`; see docs/serving.md."""
