"""Captured graphs: capture, the quantise operators, and the helpers passes are written with.

This package knows ATen graphs and nothing of algorithms or file formats.
"""
