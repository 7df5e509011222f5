"""The card: a static part that can be worked out before anything runs, then the tables, as markdown."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from kv_lm_eval import __version__


def static(model: PreTrainedModel, bytes_per_s: float | None) -> dict[str, Any]:
    """Bytes that a decode step must read at least, and the time that takes.

    Every weight but the table of input embeddings is read once a step, and every pair of the cache once.
    """
    cfg = model.config.get_text_config()
    heads = getattr(cfg, "num_key_value_heads", None) or cfg.num_attention_heads
    size = getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tied = outputs is not None and outputs.weight is inputs.weight
    read = weights - (0 if tied else sum(p.numel() * p.element_size() for p in inputs.parameters()))
    return {
        "parameters": sum(p.numel() for p in parameters),
        "weight_bytes": weights,
        "weight_bytes_read_per_step": read,
        "kv_bytes_per_token": 2 * cfg.num_hidden_layers * heads * size * model.dtype.itemsize,
        "bandwidth_bytes_per_s": bytes_per_s,
    }


def floor_s(card: Mapping[str, Any], slots: int) -> float | None:
    """Seconds that a decode step over so many slots takes at the least, by bandwidth."""
    if not card["bandwidth_bytes_per_s"]:
        return None
    read = card["weight_bytes_read_per_step"] + slots * card["kv_bytes_per_token"]
    return float(read / card["bandwidth_bytes_per_s"])


def environment(model: PreTrainedModel, device: torch.device) -> dict[str, Any]:
    """What the numbers belong to."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": "scaled_dot_product_attention",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 1) for x in os.getloadavg()],
        "commit": commit(),
        "versions": {
            "kv-lm-eval": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers")},
        },
    }


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; "unknown" outside of one."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- markdown -------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """The whole card."""
    env, model = result["environment"], result["model"]
    clock = "CPU time of this process (other work shares the machine)" if result["clock"] == "cpu" else "wall time"
    lines = [
        f"# {result['name']} on {env['device']}, {result['date']}",
        "",
        f"{env['dtype']}, {env['threads']} thread(s) of {env['cores']} cores, attention {env['attention']}, "
        f"load average {env['load_average'][0]} at the start; commit {env['commit']}; "
        + ", ".join(f"{k} {v}" for k, v in env["versions"].items())
        + ".",
        "",
        f"Times are {clock}: median [p10, p90] of {result['repeats']} repeats after {result['warm_up']} warm-up "
        "rounds; all entries of a table take turns. Prompts are random tokens, outputs of fixed length, batch 1, "
        "greedy."
        + (
            ""
            if result["in_cache"]
            else " This model has no positions counted in the cache: positions=absolute in their place."
        ),
        "",
        *table(
            ("before anything runs", ""),
            [
                ("parameters", f"{model['parameters'] / 1e6:.1f} M"),
                ("weights", megabytes(model["weight_bytes"])),
                ("of them read at every step", megabytes(model["weight_bytes_read_per_step"])),
                ("keys and values", f"{model['kv_bytes_per_token'] / 1024:.1f} KiB a token"),
                ("bandwidth", _bandwidth(model["bandwidth_bytes_per_s"], result["bandwidth_source"])),
            ],
        ),
    ]
    writers = {
        "generation": _generation,
        "decode": _decode,
        "storage": _storage,
        "prefill": _prefill,
        "memory": _memory,
        "scoring": _scoring,
        "fidelity": _fidelity,
        "one_prefill": _one_prefill,
        "shared_prefix": _shared,
        "compiled": _compiled,
        "goals": _goals,
        "growth": _growth,
    }
    for name, writer in writers.items():
        if name in result:
            lines += ["", *writer(result[name], result)]
    lines += ["", f"Made by: `{result['command']}` ({result['seconds']:.0f} s)", ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table; the first column is text, the others are numbers."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def ms(numbers: Mapping[str, Any]) -> str:
    """Median [p10, p90] in milliseconds."""
    return f"{1e3 * numbers['median']:.2f} [{1e3 * numbers['p10']:.2f}, {1e3 * numbers['p90']:.2f}]"


def megabytes(count: float | None) -> str:
    return "N/A" if count is None else f"{count / 2**20:.1f} MiB"


def ratio(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Of medians; where both took turns, the median of the rounds' ratios, which a machine slow for a while spares."""
    if len(a.get("rounds", [])) == len(b.get("rounds", [None])):
        return f"{median(x / y for x, y in zip(a['rounds'], b['rounds'], strict=True)):.2f}x"
    return f"{a['median'] / b['median']:.2f}x"


def _bandwidth(value: float | None, source: str) -> str:
    return "not known" if not value else f"{value / 1e9:.1f} GB/s ({source})"


def _generation(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    full = part["entries"].get("full")
    rows = []
    for name, e in part["entries"].items():
        against = "" if full is None else ratio(full["tpot_s"], e["tpot_s"])
        rows.append(
            (name, ms(e["ttft_s"]), ms(e["tpot_s"]), f"{e['tokens_per_s']['median']:.1f}", against)
            + (f"{e['wall_total_s']:.2f}",)
            + (megabytes(e["kv_bytes"]), megabytes(e["prefill_peak_bytes"]), megabytes(e["decode_peak_bytes"]))
        )
    head = ["method", "TTFT, ms", "TPOT, ms", "tokens/s", "full / method", "wall, s", "KV at the end"]
    head += ["prefill peak", "decode peak"]
    return [
        f"## Whole requests: {part['prompt']} tokens in, {part['new_tokens']} out, capacity {part['capacity']}",
        "",
        *table(head, rows),
        "",
        "Window recompute is a forward over the last tokens, as many as the capacity, for every new token. TTFT is "
        "prefill with its cut up to the first token id; tokens/s counts the prefill in; full / method is of TPOT, wall "
        "of the whole request; peaks are above the weights.",
    ]


def _decode(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    lines = ["## Decode step, cut included, against the full cache at as many tokens", ""]
    sizes = list(part["slots"])
    names = list(part["slots"][sizes[0]])
    rows = []
    for name in names:
        row = [name]
        for n in sizes:
            e, full = part["slots"][n][name], part["slots"][n]["full"]
            row += [ms(e), ratio(e, full)]
        rows.append(row)
    floors = ["least by bandwidth"]
    for n in sizes:
        least, full = floor_s(result["model"], int(n)), part["slots"][n]["full"]
        floors += ["not known", ""] if least is None else [f"{1e3 * least:.2f}", f"{least / full['median']:.2f}x"]
    head = ["method", *(h for n in sizes for h in (f"{n} slots, ms", "of full"))]
    last, first = part["slots"][sizes[-1]]["full"], part["slots"][sizes[0]]
    best = min(first, key=lambda name: first[name]["median"])
    times = last["median"] / first[best]["median"]
    gain = f"The full cache at {sizes[-1]} takes {times:.2f}x the step of {best} at {sizes[0]} slots."
    return [*lines, *table(head, [*rows, floors]), "", gain]


def _storage(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    full = part["entries"]["full"]
    rows = [
        (name, ms(e), ratio(e, full), megabytes(e["kv_bytes"]), f"{100 * e['kv_bytes'] / full['kv_bytes']:.0f} %")
        for name, e in part["entries"].items()
    ]
    head = ("pairs held as", "ms a step", "of full", "keys and values", "of full")
    return [f"## Forms of storage, {part['slots']} tokens, nothing evicted", "", *table(head, rows)]


def _prefill(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    full = part["entries"]["full"]
    rows = [
        (name, ms(e), ratio(e, full), ms(e["cut_s"]), f"{100 * e['cut_s']['median'] / full['median']:.1f} %")
        for name, e in part["entries"].items()
    ]
    head = ("method", "prefill, ms", "of full", "of it in cuts, ms", "cuts, of full")
    return [f"## Prefill of {part['prompt']} tokens, capacity {part['capacity']}", "", *table(head, rows)]


def _memory(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    sizes = list(part["prompts"])
    names = list(part["prompts"][sizes[0]])
    rows = [[name, *(megabytes(part["prompts"][n][name]) for n in sizes)] for name in names]
    for row, name in zip(rows, names, strict=True):
        first, last = (part["prompts"][n][name] for n in (sizes[0], sizes[-1]))
        row.append(f"{last / first:.1f}x")
    times = int(sizes[-1]) / int(sizes[0])
    head = ("one forward unless said", *(f"{n} tokens" for n in sizes), f"for {times:.0f}x the length")
    note = (
        "Above the weights, of live tensors. A part of the size length x length would grow with the square. In chunks, "
        "what grows is keys and values alone: activations, those of the MLP too, are of one chunk. With a cut after "
        "every chunk nothing grows."
    )
    return [f"## Peak memory of a prefill, capacity {part['capacity']}", "", *table(head, rows), "", note]


def _scoring(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    band = part["entries"]["band"]
    rows = [(name, ms(e), ratio(e, band)) for name, e in part["entries"].items()]
    title = f"## Exact log-likelihood of {part['tokens']} tokens under streaming_llm"
    return [title, "", *table(("", "ms a token", "of the band"), rows)]


def _fidelity(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    rows = []
    for method in part["methods"]:
        alone, beside = (part["entries"][f"{method} {way}"] for way in ("alone", "beside full"))
        rows.append((method, ms(alone), ms(beside), ratio(beside, alone)))
    title = f"## A text of {part['tokens']} tokens with the full cache beside the method (fidelity=True)"
    return [title, "", *table(("", "alone, ms a token", "beside full", "of alone"), rows)]


def _one_prefill(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    rows = []
    for n, entries in part["methods"].items():
        for name, e in entries.items():
            rows.append((f"{n} methods, {name}", ms(e), ratio(entries["one by one"], e)))
    title = f"## A prompt of {part['prompt']} tokens under many methods, answers of {part['new_tokens']} tokens"
    return [title, "", *table(("", "ms", "one by one / this"), rows)]


def _shared(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    rows = []
    for k, entries in part["choices"].items():
        for name, e in entries.items():
            rows.append((f"{k} choices, {name}", ms(e), ratio(entries["recompute"], e)))
    title = f"## Continuations of one context of {part['context']} tokens"
    lines = [title, "", *table(("", "ms", "recompute / this"), rows)]
    asked = []
    for n, entries in part.get("questions", {}).items():
        for name, e in entries.items():
            words = name if name == "the context alone" else f"{n} questions, {name}"
            asked.append((words, ms(e), ratio(entries["the context for each"], e)))
    title = f"## Questions on one context of {part['context']} tokens, answers of 8 tokens"
    return [*lines, "", title, "", *table(("", "ms", "for each / this"), asked)] if asked else lines


def _compiled(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    eager = part["entries"]["streaming_ring"]
    rows = [(name, ms(e), ratio(e, eager)) for name, e in part["entries"].items()]
    least = floor_s(result["model"], part["slots"])
    if least is not None:
        share = least / part["entries"]["streaming_ring compiled"]["median"]
        rows.append(("least by bandwidth", f"{1e3 * least:.2f}", f"{100 * share:.0f} % of the ceiling reached"))
    return [
        f"## Compiled decode step over {part['slots']} slots",
        "",
        *table(("", "ms a step", "of eager"), rows),
        "",
        f"Compiling took {part['compile_s']:.0f} s of wall time; largest difference of a logit "
        f"{part['max_abs_difference']:.1e}.",
    ]


ONE_PREFILL = {"12": 1 / 8, "20": 1 / 11}  # of as many prefills, by the number of methods


def _goals(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    rows, shared = list[tuple[str, ...]](), result.get("one_prefill", {})
    for count, times in shared.get("methods", {}).items():
        measured = times["together"]["median"] / times["one by one"]["median"]
        name = f"{count} methods from one prefill of {shared['prompt']} tokens, of one by one"
        if count in ONE_PREFILL:
            goal = ONE_PREFILL[count]
            rows.append((name, f"<= {goal:.3f}x", f"{measured:.3f}x", "yes" if measured <= goal else "no"))
    for ratio in part["ratios"]:
        goal, measured = ratio["goal"], ratio["measured"]
        cells = [f"{100 * x:.1f} %" if goal < 0.1 else f"{x:.2f}x" for x in (goal, measured)]
        rows.append((ratio["name"], f"<= {cells[0]}", cells[1], "yes" if measured <= goal else "no"))
    return ["## Goals", "", *table(("ratio of least times", "goal", "measured", "met"), rows)]


def _growth(part: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, entry in part["entries"].items():
        cells = [f"{e['seconds']:.2f} s, {megabytes(e['bytes'])}" for e in entry["at"].values()]
        slopes = [entry["seconds_slope"], entry["bytes_slope"]]
        cells += ["" if slope is None else f"{slope:.2f}" for slope in slopes]
        rows.append((name, *cells, str(entry["bend"] or ""), entry["why"]))
    lengths = list(next(iter(part["entries"].values()))["at"])
    head = ["a prompt of", *(f"{n} tokens" for n in lengths), "slope, time", "slope, memory", "bend, tokens", "why"]
    title = f"## Growth with the prompt, capacity {part['capacity']}, chunks of {part['chunk']}"
    note = (
        "Slopes are between the last two lengths: 1 grows with the length, 2 with its square. At the bend half of the "
        "time is the square's. Memory is the peak above the weights, of live tensors."
    )
    return [title, "", *table(head, rows), "", note]
