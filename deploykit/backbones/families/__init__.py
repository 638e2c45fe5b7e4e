"""Backbones that timm lacks: one file a family, found by its registration in it."""
