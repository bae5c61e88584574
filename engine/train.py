"""The main command: `deepspeed engine/train.py [--config FILE] [key=value ...]`.

Without arguments it distills the embedded digits teacher.
"""

import os
import sys
from pathlib import Path

# Run as a script, Python puts this folder on sys.path, where our modules would be found under top-level names.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

# Waiting threads sleep instead of spinning: with spinning, a neighbour on one core slows training many times. OpenMP
# reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run one distillation; returns the exit code: 0, or 2 after an error that was explained."""
    parser = argparse.ArgumentParser(
        prog="deepspeed engine/train.py",
        description="Distill a many-step diffusion teacher into a few-step student by policy optimisation.",
        epilog="Every key, its default and its meaning: engine/settings.py.",
    )
    parser.add_argument("--config", help="YAML file; default: the embedded digits")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimizer.lr=1e-5 zero.stage=2")
    options = parser.parse_intermixed_args(arguments)

    from engine.chatter import silence
    from engine.config import load_config
    from engine.errors import EngineError

    silence()
    try:
        config = load_config(options.config, options.overrides)
        from engine.distillation import distill

        distill(config)
    except EngineError as error:
        # Bad input is found by all ranks alike; what goes wrong in an iteration may be one rank's alone.
        if os.environ.get("RANK", "0") == "0" or str(error).startswith("iteration "):
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _run() -> int:
    code = main()
    if code == 0:
        from engine import ranks

        ranks.stop()
    return code


if __name__ == "__main__":
    sys.exit(_run())
