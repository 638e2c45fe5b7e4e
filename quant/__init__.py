"""The quant room: ranges, folds, quantisers, rounding, and where Q/DQ go.

It turns a captured graph into a quantised graph. It knows no file format and no device.
"""
