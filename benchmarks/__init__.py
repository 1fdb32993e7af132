"""Measurements of gdbp against its peers and against the hardware's limit; see benchmarks/README.md.

Arrows point one way: cli -> run, scaling -> measure, cases -> work; table, compare, report, html and plot only read
what measure wrote.
"""
