"""Rewrites that leave the float result as it is and make the network easier to quantise.

``batch_norm`` comes first. ``norm`` takes the candidates of ``candidates`` and ``smooth``;
``head_scale`` works on what ``attention`` finds (its operands by ``operands``); ``equalize``
works on neighbouring layers. ``layers`` holds the arithmetic on weights and ``trace`` follows
channels through a graph.
"""
