"""Layers that own families share and timm lacks."""
