"""Batches of any size on Ray Data: what is asked, who answers, and which answers are on disk."""
