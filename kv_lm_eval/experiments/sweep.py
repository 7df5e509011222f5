"""Run a grid of methods, settings, tasks and models from one YAML file; start it again and it goes on where it was.

Each point of the grid is a normal lm-eval run with a folder of its own. Finished points are skipped, found by a hash of
everything that decides a number; an interrupted one goes on with the answers it has; one that fails or runs out of
memory is recorded, and the rest goes on. How to write the file, and what is in the folder: docs/sweeps.md.

Usage:
    kv-lm-eval sweep CONFIG.yaml --output_path DIR
    kv-lm-eval sweep CONFIG.yaml --output_path DIR --dry-run  # plan and cost
    kv-lm-eval sweep CONFIG.yaml --output_path DIR --retry-failed  # once more
    kv-lm-eval sweep CONFIG.yaml --output_path DIR \\
        --executor ray --num_workers 2 --num_gpus 1

Ready files are in scripts/configs/ of the repository, such as tiny/snapkv_window_capacity.yaml for the embedded model.

Output: DIR/plan.json, DIR/points/NAME-HASH/{point.json,log.txt,MODEL/results_*.json,MODEL/samples_*.jsonl}. The last
line printed is a JSON document. Exit status: 0 all done, 1 some failed, 2 a mistake in the configuration, 130 and 143
stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kv_lm_eval import console, files, progress
from kv_lm_eval.errors import UserError, close_names
from kv_lm_eval.experiments import cost, plan
from kv_lm_eval.experiments.run_group import Job, groups, run_group
from kv_lm_eval.experiments.run_point import (
    DONE,
    FAILED,
    OUT_OF_MEMORY,
    RECORD,
    folder_of,
    read_record,
    tidy,
    versions,
    why_not_done,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, skip what is done, run the rest; returns the exit status."""
    started: list[Job] = []
    return console.command("sweep", lambda: _sweep(argv, started), lambda: _kept(started))


def _sweep(argv: Sequence[str] | None, started: list[Job]) -> int:
    args = _parser().parse_args(argv)
    if args.num_workers is not None and args.num_workers < 1:
        raise UserError(f"--num_workers {args.num_workers}: give 1 or more, or leave it out for as many as fit")
    overrides = dict(_key_and_value(text) for text in args.set)
    config, points = plan.load(args.config, overrides)
    output = args.output_path or Path("results") / str(config["name"])
    if not args.dry_run:
        files.check_folder(output, "--output_path")
    for point in points:
        point["id"] = folder_of(point, output).name
    try:
        plan.check(points)
    except UserError as error:
        raise _named(error, overrides, config) from error
    if args.dry_run:
        return _show(points, output)
    with _alone_in(output):
        return _run(config, points, output.resolve(), args, started)


def _named(error: UserError, overrides: dict[str, Any], config: dict[str, Any]) -> UserError:
    """What is wrong with a plan in a line, where a `--set` misses its variable: every point says it otherwise."""
    variables = sorted(config["vars"].keys() - {"here"})
    for key in overrides.keys() - config["vars"].keys():
        if f"unknown setting {key!r}" in str(error):
            return UserError(
                f"--set {key}=...: the sweep {config['name']} has no such variable{close_names(key, variables)}, and "
                f"its methods no such setting; its variables: {', '.join(variables) or 'none'}. Nothing was started."
            )
    return error


def _kept(started: list[Job]) -> str:
    """What a stopped sweep leaves."""
    if not started:
        return "Nothing had been started."
    done = sum(read_record(folder).get("status") == DONE for _, folder in started)
    return (
        f"{done} of {len(started)} points are done and kept in {started[0][1].parents[1]}, with the answers so far of "
        "the one that was running: the same command goes on from there."
    )


def _parser() -> argparse.ArgumentParser:
    parser = console.Parser(prog="kv-lm-eval sweep", description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file, see docs/sweeps.md")
    parser.add_argument("--output_path", type=Path, help="folder of this sweep (default: results/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, run nothing")
    parser.add_argument("--retry-failed", action="store_true", help="run failed and out-of-memory points again")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace one of `vars` or `defaults`, such as device=cuda or limit=20; may be repeated",
    )
    parser.add_argument(
        "--one-by-one",
        action="store_true",
        help="run every point for itself: points that differ in their method alone share the loaded model and each "
        "prompt's prefill otherwise, and so have no times of their own",
    )
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="ray: needs the extra [ray]")
    ray = parser.add_argument_group("with --executor ray")
    ray.add_argument("--num_workers", type=int, default=None, help="points at a time (default: as many as fit)")
    ray.add_argument("--num_cpus", type=float, default=1, help="processors a point (default 1)")
    ray.add_argument("--num_gpus", type=float, default=0, help="GPUs a point, may be a fraction (default 0)")
    ray.add_argument("--ray_address", default=None, help="of a running cluster, or auto (default: start one here)")
    return parser


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {text}: give KEY=VALUE")
    return key, files.parse_yaml(value, f"--set {text}")


@contextmanager
def _alone_in(output: Path) -> Iterator[None]:
    """Two sweeps in one folder would run the same points twice; the lock goes with the process, however it ends."""
    from filelock import FileLock, Timeout

    lock = FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another sweep is writing to {output}; wait for it, or take another folder") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{output} cannot be locked ({error}); take a folder on another disk") from None
    try:
        yield
    finally:
        lock.release()


def _show(points: list[dict[str, Any]], output: Path) -> int:
    """--dry-run: a row a point, and the sum."""
    records = [read_record(folder_of(point, output)) for point in points]
    notes: list[str] = []
    with console.quietly():
        counted = cost.count(points, notes.append)
    expected = cost.seconds(points, counted, records)
    rows = [
        {
            "": i,
            "point": point["name"],
            "tasks": point["label"][:40],
            "model": str(point["model_args"].get("pretrained", "")),
            "status": record.get("status", "to do"),
            "prompts": "?" if prompts is None else f"{prompts:,}",
            "tokens": "?" if tokens is None else f"{tokens:,}",
            "seconds": "?" if time is None else f"{time:.0f}" if record.get("status") == DONE else f"~{time:.0f}",
        }
        for i, (point, record, (prompts, tokens), time) in enumerate(
            zip(points, records, counted, expected, strict=True), 1
        )
    ]
    print(console.table(rows))
    todo = [i for i, record in enumerate(records) if record.get("status") != DONE]
    print(f"\n{len(points)} points, {len(points) - len(todo)} done, {len(todo)} to do:", end=" ")
    tokens = [counted[i][1] for i in todo]
    times = [expected[i] for i in todo]
    print("tokens not known," if None in tokens else f"{sum(t or 0 for t in tokens):,} prompt tokens,", end=" ")
    if None in times:
        print("time not known: the first finished point gives a rate, then ask again")
    else:
        print(
            f"about {progress.clock(sum(t or 0 for t in times))} one after the other, at the median rate of those done"
        )
    print("\n".join(dict.fromkeys(notes)))
    return 0


def _run(
    config: dict[str, Any], points: list[dict[str, Any]], output: Path, args: argparse.Namespace, started: list[Job]
) -> int:
    about = {"config": str(args.config), "name": config["name"], "description": config.get("description", "")}
    files.write_json(output / "plan.json", {**about, "versions": versions(), "points": points})
    jobs = [(point, output / "points" / point["id"]) for point in points]
    started += jobs
    todo = _not_finished(jobs, args.retry_failed)
    for point, folder in jobs:
        _rename(point, folder)
    print(f"{len(points)} points, {len(points) - len(todo)} finished before, {len(todo)} to run; results: {output}")
    runner = _with_ray(todo, args) if args.executor == "ray" else _here(todo, args.one_by_one)
    for record in _watched(runner, todo, local=args.executor == "local"):
        if record["status"] != DONE:
            tqdm.write(_complaint(record, output), file=sys.stderr)
    records = [read_record(folder) for _, folder in jobs]
    wrong = [(job, why) for job, record in zip(jobs, records, strict=True) if (why := why_not_done(record, job[1]))]
    print(f"{len(records) - len(wrong)} of {len(records)} points done")
    for (point, folder), why in wrong:
        record = read_record(folder)
        told = (
            record if record.get("status") in (FAILED, OUT_OF_MEMORY) else {**point, "status": "not done", "error": why}
        )
        print(_complaint(told, output))
    if wrong:
        print("run again with --retry-failed when the reason is gone")
    counts = {status: sum(r.get("status") == status for r in records) for status in (FAILED, OUT_OF_MEMORY)}
    done = {DONE: len(records) - len(wrong)}
    print(json.dumps({"output_path": str(output), "points": len(records), "run_now": len(todo), **done, **counts}))
    return 1 if wrong else 0


def _not_finished(jobs: list[Job], retry_failed: bool) -> list[Job]:
    """What is to be run; a point that says it is done but has lost a file is, and that is told."""
    out = []
    for point, folder in jobs:
        record = read_record(folder)
        if record.get("status") in (FAILED, OUT_OF_MEMORY) and not retry_failed:
            continue
        if why := why_not_done(record, folder):
            if record.get("status") == DONE:
                print(f"run again: {point['name']}: {why} ({folder})", file=sys.stderr)
            out.append((point, folder))
        else:
            tidy(folder)
    return out


def _watched(runner: Iterator[dict[str, Any]], todo: list[Job], local: bool) -> Iterator[dict[str, Any]]:
    """The finished points, under a bar of points; what is left of the one that runs stands beside it."""
    names = [point["name"] for point, _ in todo]
    with progress.Bar(total=len(todo), unit="points", smoothing=0, desc="sweep", disable=not todo) as bar:

        def line() -> str:
            inner = progress.innermost()
            return bar.told() + (f"; {inner}" if local and inner and inner != bar.told() else "")

        bar.set_postfix_str(names[0] if local and names else "", refresh=False)
        with progress.told_every_minute(line, bar=bar):
            for record in runner:
                bar.set_postfix_str(names[bar.n + 1] if local and bar.n + 1 < len(names) else "", refresh=False)
                bar.update()
                yield record


def _rename(point: dict[str, Any], folder: Path) -> None:
    """A point that was run before is called what the configuration calls it now."""
    record, words = read_record(folder), {key: point[key] for key in ("name", "label", "axes")}
    if record and {**record, **words} != record:
        files.write_json(folder / RECORD, {**record, **words})


def _complaint(record: dict[str, Any], output: Path) -> str:
    reason = str(record.get("error") or "").strip().splitlines() or ["no reason recorded"]
    return (
        f"{record['status'].upper()}: {record['name']}: {reason[0][:300]} ({output / 'points' / record['id']}/log.txt)"
    )


def _here(jobs: list[Job], one_by_one: bool) -> Iterator[dict[str, Any]]:
    for group in [[job] for job in jobs] if one_by_one else groups(jobs):
        yield from run_group(group)


def run_jobs(jobs: list[Job]) -> list[dict[str, Any]]:
    """A group in a worker of Ray's."""
    return list(run_group(jobs))


def _with_ray(jobs: list[Job], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Groups of points as Ray tasks, on one machine or many; the output folder must be one that all of them see."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report home
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install 'kv-lm-eval[ray]'; or take --executor local") from None
    if not jobs:
        return
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address=args.ray_address,
        include_dashboard=False if not args.ray_address else None,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
        num_cpus=None if args.ray_address or not args.num_workers else args.num_workers * args.num_cpus,
    )
    try:
        task = ray.remote(num_cpus=args.num_cpus, num_gpus=args.num_gpus, max_retries=0)(run_jobs)
        at_once = args.num_workers or _room(ray.cluster_resources(), args)
        waiting = [[job] for job in jobs] if args.one_by_one else groups(jobs, at_least=at_once)
        running: dict[Any, list[Job]] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                group = waiting.pop(0)
                running[task.remote(group)] = group
            finished, _ = ray.wait(list(running), num_returns=1)
            group = running.pop(finished[0])
            try:
                yield from ray.get(finished[0])
            except ray.exceptions.RayError as error:  # the worker died: killed, or out of the host's memory
                done = [record for _, folder in group if (record := read_record(folder)).get("status") == DONE]
                yield from done
                rest = [job for job in group if read_record(job[1]).get("status") != DONE]
                if len(group) > 1:  # whose fault it was is found out one by one
                    waiting += [[job] for job in rest]
                    continue
                memory = isinstance(error, ray.exceptions.OutOfMemoryError)
                for point, folder in rest:
                    record = {**point, **read_record(folder), "status": OUT_OF_MEMORY if memory else FAILED}
                    record["error"] = f"the worker died: {error}"
                    folder.mkdir(parents=True, exist_ok=True)
                    files.write_json(folder / RECORD, record)
                    yield record
    finally:
        ray.shutdown()


def _room(resources: dict[str, float], args: argparse.Namespace) -> int:
    """How many points a cluster can run at a time."""
    asked = {"CPU": args.num_cpus, "GPU": args.num_gpus}
    return max(1, min(int(resources.get(name, 0) // each) for name, each in asked.items() if each))


if __name__ == "__main__":
    sys.exit(main())
