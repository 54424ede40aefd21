"""Plots and tables: what is drawn and printed is what was given."""

import struct
from pathlib import Path
from typing import Any

import pytest

from lolrl import plots, report


def row(name: str, reward: float, **more: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"name": name, "judge": 0.5, "improved": 0.61, "words": 21.25}
    base |= {"reward": reward, "reward_low": reward - 0.05, "reward_high": reward + 0.04}
    base |= {"matched": reward - 0.01, "matched_low": reward - 0.06, "matched_high": reward + 0.03}
    base |= {"distinct": (0.431, 0.869, 0.989), "ppl_ref": 72.3, "divergence": 1.5}
    return base | {"updates": 100, "kept": 0.52, "step_seconds": 0.123} | more


ROWS = [row("sft", 0.15, divergence=0.0, improved=None), row("nll", 0.14), row("a_lol", 0.45)]


def size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


@pytest.fixture
def drawn(monkeypatch) -> list[Any]:
    """The figures that the functions save, in order."""
    figures: list[Any] = []
    save = plots._save

    def keep(figure: Any, path: Any) -> Path:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def test_reward_plot_shows_every_mean_and_interval(tmp_path, drawn) -> None:
    path = plots.plot_rewards(ROWS, tmp_path / "deep" / "reward.png", title="Title")
    assert path == tmp_path / "deep" / "reward.png"
    assert min(size(path)) >= 300
    (axis,) = drawn[0].axes
    assert [t.get_text() for t in axis.get_yticklabels()] == ["sft", "nll", "a_lol"]
    assert [t.get_text() for t in axis.texts] == ["0.150", "0.140", "0.450"]
    # One error bar each for the reward as it is and at matched length.
    spans = [c.lines[2][0].get_segments()[0][:, 0].tolist() for c in axis.containers]
    for at, entry in enumerate(ROWS):
        as_is, matched = spans[2 * at : 2 * at + 2]
        assert as_is == pytest.approx([entry["reward_low"], entry["reward_high"]])
        assert matched == pytest.approx([entry["matched_low"], entry["matched_high"]])
    assert axis.get_title(loc="left") == "Title"


def test_reward_plot_without_matched_lengths(tmp_path, drawn) -> None:
    plots.plot_rewards([row("sft", 0.1, matched=None)], tmp_path / "r.png")
    assert len(drawn[0].axes[0].containers) == 1


def test_divergence_plot_places_methods(tmp_path, drawn) -> None:
    size(plots.plot_divergence(ROWS, tmp_path / "d.png"))
    (axis,) = drawn[0].axes
    points = [c.lines[0].get_xydata()[0].tolist() for c in axis.containers]
    assert points == [[0.0, 0.15], [1.5, 0.14], [1.5, 0.45]]
    (legend,) = drawn[0].legends
    assert [t.get_text() for t in legend.get_texts()] == ["sft", "nll", "a_lol"]


def test_curves_have_a_panel_a_quantity_and_a_line_a_method(tmp_path, drawn) -> None:
    logs: dict[str, list[dict[str, Any]]] = {
        "nll": [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 2.0}],
        "a_lol": [
            {"step": 5, "loss": 1.0, "clip_ratio": 0.1},
            {"step": 10, "loss": 0.5, "clip_ratio": 0.2},
            {"step": 10, "eval_reward": 0.4},
        ],
    }
    size(plots.plot_curves(logs, tmp_path / "c.png"))
    panels = {axis.get_title(loc="left"): axis for axis in drawn[0].axes if axis.get_visible()}
    titles = ["reward on validation prompts", "loss", "share of ratios outside the clip"]
    assert list(panels) == titles
    lines = {line.get_label(): line.get_xydata().tolist() for line in panels["loss"].get_lines()}
    assert lines == {"nll": [[5, 3.0], [10, 2.0]], "a_lol": [[5, 1.0], [10, 0.5]]}
    (reward,) = panels["reward on validation prompts"].get_lines()
    assert reward.get_xydata().tolist() == [[10, 0.4]]


def test_the_reference_and_the_control_are_grey() -> None:
    colors = plots._colors(["sft", "nll", "a_lol", "a_lol_seq"])
    assert colors["sft"] == "0.2"
    assert colors["nll"] == "0.55"
    assert colors["a_lol"] != colors["a_lol_seq"]


@pytest.mark.parametrize(
    ("function", "rows", "cause"),
    [
        (plots.plot_rewards, [], "rows is empty"),
        (plots.plot_divergence, [], "rows is empty"),
        (plots.plot_rewards, [{"name": "a", "reward": 1.0}], "row 'a' has no reward_low"),
        (plots.plot_divergence, [row("b", 0.2, divergence=None)], "row 'b' has no divergence"),
        (plots.plot_curves, {"a": [{"step": 1}]}, "nothing to draw"),
    ],
)
def test_missing_figures_are_named(tmp_path, function, rows, cause) -> None:
    with pytest.raises(ValueError, match=cause):
        function(rows, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# --- tables ---


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_results_table() -> None:
    lines = report.results_table([*ROWS, row("wbc", 0.2, step_seconds=None)]).splitlines()
    head = cells(lines[0])
    third = dict(zip(head, cells(lines[4]), strict=True))
    assert third == {
        "method": "a_lol",
        "reward": "0.450 [0.400, 0.490]",
        "matched": "0.440 [0.390, 0.480]",
        "judge": "0.50",
        "improved": "61%",
        "distinct-1/2/3": ".431/.869/.989",
        "words": "21.2",
        "ppl": "72.3",
        "divergence": "1.50",
        "updates": "100",
        "kept": "52%",
        "step": "123 ms",
    }
    assert cells(lines[2])[head.index("improved")] == "–"
    assert cells(lines[5])[head.index("step")] == "–"
    assert len({len(line) for line in lines}) == 1  # it lines up as plain text too


def test_spread_is_mean_and_deviation_over_seeds() -> None:
    runs = [
        [row("sft", 0.10), row("a_lol", 0.40)],
        [row("sft", 0.20), row("a_lol", 0.42)],
        [row("sft", 0.12), row("a_lol", 0.50)],
    ]
    reference, method = report.spread(runs)
    assert method["reward"] == pytest.approx(0.44)
    assert method["reward_sd"] == pytest.approx(0.0529150, abs=1e-6)
    assert method["gain"] == pytest.approx(0.30)
    assert method["worst_gain"] == pytest.approx(0.22)
    assert reference["gain"] == reference["worst_gain"] == 0.0
    table = report.spread_table([reference, method])
    assert cells(table.splitlines()[3])[1:4] == ["0.440 ± 0.053", "0.300 ± 0.080", "0.220"]
    assert report.spread(runs[:1])[1]["reward_sd"] is None
    with pytest.raises(ValueError, match="same methods"):
        report.spread([runs[0], runs[1][:1]])


def test_loss_table_prints_the_quotients() -> None:
    cost = {"fused_seconds": 0.01, "eager_seconds": 0.04}
    cost |= {"fused_bytes": 2 << 20, "eager_bytes": 8 << 20}
    lines = report.loss_table(cost).splitlines()
    assert cells(lines[2]) == ["fused", "10.0 ms", "2.0 MiB"]
    assert cells(lines[3]) == ["eager", "40.0 ms", "8.0 MiB"]
    assert cells(lines[4]) == ["fused / eager", "0.25", "0.25"]


def test_samples_stand_side_by_side() -> None:
    samples = {
        "sft": [{"prompt": "The film", "completion": " is\n long", "reward": -0.1}] * 3,
        "a_lol": [{"prompt": "The film", "completion": " is fun", "reward": 0.6}] * 3,
    }
    text = report.samples_text(samples, 1)
    assert text.splitlines() == [
        "**The film** …",
        "",
        "- `sft` (-0.10): is long",
        "- `a_lol` (+0.60): is fun",
    ]
