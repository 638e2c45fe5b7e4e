"""Backbones: names, construction, weights, and facts. Own families are one file each."""
