"""The small app with which ``benchmarks/callback.py`` compares: other ways to take a callback."""
