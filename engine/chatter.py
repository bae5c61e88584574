"""Warnings that other packages print on import and that tell a user of our commands nothing."""

import logging


def silence() -> None:
    """Hide what xformers and bitsandbytes say, while they are imported, of operators that this machine lacks."""
    for name in ("xformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
