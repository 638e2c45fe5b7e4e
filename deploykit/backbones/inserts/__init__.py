"""Layers that papers add to, or put in place of, those of a host: one file each."""
