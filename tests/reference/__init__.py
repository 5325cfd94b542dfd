"""Independent references: a float64 numpy forward, uncached decoders, random models to run them on.

Nothing here imports the engine, and nothing is cached: every forward recomputes its whole sequence.
"""
