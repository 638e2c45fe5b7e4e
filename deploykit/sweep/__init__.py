"""Sweeps: many recipes of one kind, each a run in a process of its own, and the best of them."""
