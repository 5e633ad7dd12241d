"""What petalnode takes, measured: ``python -m benchmarks [section …]``. See ``__main__``."""
