"""One trace of a model: every use of every parameter, with its inputs and output cotangents.

A jaxpr interpreter follows each parameter to its uses, and each batch axis to the output. Where the
uses are known and the examples stay apart, one forward pass records the inputs of all uses, and
every backward pass gives the cotangents of all their outputs, example by example. What is computed
from those, such as factors and diagonals, is in `fvp.layers`.

The letters of array axes, E R G I O K, are explained in `uses.py`. Imports heads, curvature,
numerics, compatibility and typing; never `fvp.layers`.
"""
