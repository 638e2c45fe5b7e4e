"""Rewrites that leave the float result as it is and make the network easier to quantise."""
