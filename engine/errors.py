"""The one error that a user is meant to read: what was given, what is allowed, what to do."""


class EngineError(ValueError):
    """Bad input or a run that must not go on. The command line prints it as one paragraph and exits with code 2."""


ADVICE = "nothing was updated with it. Lower optimizer.lr, or look at the last rows of metrics.jsonl"
"""What to do when a number is not finite."""
