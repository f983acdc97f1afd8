"""The parts of `benchmarks.gpu`, how they are run within a time, and their report.

A part is a function `measure(setting, record, **arguments)` in a module of its own, listed in `parts.py`. It runs in a
process of its own and writes down each figure as soon as it has it, so that a part that fails, crashes or hangs costs
nothing but itself.
"""
