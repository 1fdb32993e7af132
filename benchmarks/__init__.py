"""Measurements of gdbp against its peers and against the hardware's limit; see benchmarks/README.md.

Arrows point one way: run -> measure -> cases -> work; table and report only read what measure wrote.
"""
