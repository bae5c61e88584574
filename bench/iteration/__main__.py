"""A training iteration of ours, of the reference's recipe and of Flow-GRPO-style loops, in one run.

    python -m bench.iteration [--device cpu|cuda] [--models NAME ...] [--json FILE]

All loops share the network, its initial student, the conditions and their noise, the group size, the seeds, the
optimizer, its learning rate and the reward. On a CPU the loops take turns, on one thread, and the digits' trained
students are judged over three seeds; the other networks have random weights. The first model's figures are the file's
top level, the others' are under "more_models".
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Sequence
from pathlib import Path

from engine.chatter import silence


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.iteration", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="by default all of the device's")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args(arguments)
    silence()
    os.environ["DS_ACCELERATOR"] = options.device  # DeepSpeed reads it when it is imported, which the next lines do

    from bench.iteration import summary
    from bench.iteration.measure import LOOPS, Judge, peak_bytes, train
    from bench.iteration.problems import PROBLEMS
    from bench.record import machine, write_json
    from engine import ranks

    problems = PROBLEMS[options.device]
    models = options.models or list(problems)
    if unknown := set(models) - set(problems):
        parser.error(f"--models {' '.join(sorted(unknown))}: {options.device} has {', '.join(problems)}")
    ranks.start(next(iter(problems.values())).config(0).train.threads)
    results = {}
    for model in models:
        problem = problems[model]
        config = problem.config(0)
        teacher = problem.teacher(ranks.device(), config.precision)
        peaks = {name: peak_bytes(problem, name, teacher) for name in LOOPS}  # and a warm-up
        judge = Judge(config, teacher) if problem.judged else None
        # A GPU's clock is steady, and its memory does not hold five students' optimizers at once.
        turns = [LOOPS] if options.device == "cpu" else [(name,) for name in LOOPS]
        records = {name: [] for name in LOOPS}
        for seed in range(problem.seeds):
            for names in turns:
                for name, record in train(problem, names, seed, teacher, judge).items():
                    records[name].append(record)
                gc.collect()
        results[model] = summary.summarise(config, records, peaks, judge(teacher.network) if judge else None)
        print(summary.table(model, results[model]), end="\n\n", flush=True)
    if options.json is not None:
        first, *others = models
        head = {"what": "bench.iteration", **machine(options.device), "model": first}
        write_json(options.json, {**head, **results[first], "more_models": {name: results[name] for name in others}})


if __name__ == "__main__":
    main()
