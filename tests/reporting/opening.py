"""How long the page of a large sweep takes to open, measured in the browser; by hand, since no test asserts a time.

    PYTHONPATH=. python tests/reporting/opening.py [POINTS]

500 points (the default) have 20,000 answers: 24 of a needle grid, 10 of questions and 6 texts each. Prints the size of
the page, and milliseconds to the first paint, to the end of loading and until it answers: medians of five, on a screen
and on a phone; and milliseconds of the page's CPU, since other work delays all of these.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import Page
from results import FULL, efficiency, mean_task, perplexity_task, plan, point, run

from kv_lm_eval.reporting import build

METHODS = "snapkv h2o tova knorm keydiff streaming_llm expected_attention pyramidkv adakv lagkv".split()
TIMES = """new Promise((done) => new PerformanceObserver((seen) => {
  const paint = seen.getEntriesByName('first-contentful-paint')[0];
  if (paint) requestAnimationFrame(() => setTimeout(() =>
    done([paint.startTime, performance.getEntriesByType('navigation')[0].loadEventEnd, performance.now()]), 0));
}).observe({ type: 'paint', buffered: true }))"""


def sweep(folder: Path, count: int) -> None:
    """Its files."""
    draw = random.Random(0)
    places = [
        {"context_length": n, "document_depth_percent": d} for n in (1024, 2048, 4096, 8192) for d in (0, 50, 100)
    ]
    places *= 2
    points = []
    for i in range(count):
        compression = {"method": METHODS[i % 10], "max_capacity_prompt": 16 * (1 + i // 10)} if i else FULL
        right = 0.3 + 0.6 * i / count if i else 1.0
        words = [f"The secret code is {draw.randrange(10**6)}. " + "lorem ipsum dolor " * 8 for _ in places]
        tasks = {
            "kv_needle": mean_task(
                [float(draw.random() < right) for _ in places],
                "exact_match",
                extra=places,
                answers=words,
                prompt="x " * 200 + "{}",
            ),
            "qasper": mean_task([draw.random() * right for _ in range(10)], "score", answers=words[:10]),
            "kv_ppl": perplexity_task([(-30.0 * (2 - right) - draw.random(), 10) for _ in range(6)]),
        }
        spread = {
            name: {"median": 0.1 + draw.random(), "p10": 0.05, "p90": 1.3, "n": 40} for name in ("ttft_s", "tpot_s")
        }
        place = folder / "points" / f"p{i:03d}"
        stats, args = {"efficiency": efficiency(**spread)}, {"pretrained": "models/toy", **compression}
        file = run(place / "toy", compression, tasks, date=i % 60, stats=stats, model_args=args)
        points.append(point(place, "", "done", compression, list(tasks), str(file.relative_to(place))))
    plan(folder, points, "large")


def main() -> None:
    """Builds, opens, prints."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sweep(folder / "in", count)
        begin = time.process_time()
        file = build.write(folder / "in", folder / "out").page
        numbers = {"points": count, "bytes": file.stat().st_size, "build_cpu_s": time.process_time() - begin}
        tab = Page(folder / "profile")
        tab.tell("Performance.enable", timeDomain="threadTicks")  # of the CPU, whatever else the machine does
        for width in (1280, 390):
            with tab.seen(width=width):
                found = []
                for _ in range(5):
                    tab.load(file)
                    of_cpu = {
                        metric["name"]: metric["value"] for metric in tab.tell("Performance.getMetrics")["metrics"]
                    }
                    found.append([*tab.js(TIMES), 1000 * of_cpu["TaskDuration"]])
            middle = [round(statistics.median(times)) for times in zip(*found, strict=True)]
            numbers[str(width)] = dict(
                zip(("first_paint_ms", "loaded_ms", "answers_ms", "cpu_ms"), middle, strict=True)
            )
        tab.close()
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
