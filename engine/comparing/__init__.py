"""The parts of `python -m engine.compare`."""
