"""Warnings that other packages print and that tell a user of our commands nothing."""

import logging
import os


def silence() -> None:
    """Hide what xformers and bitsandbytes say, while they are imported, of operators that this machine lacks, and what
    diffusers and transformers say that is no error."""
    for name in ("xformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
