"""The plots: made from records alone, byte for byte the same, in both themes, nothing cut off.

The records here are invented: they show what is drawn, not how fast anything is.
"""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
import plots
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

NAMES = ("tokens", "vocab", "floor", "error")


def row(contestant: str, ms: float, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    shape = f"T=1024 D=768 V=50257 L=128 {dtype}"
    known = {"label": contestant, "contestant": contestant, "op": "linear_loss", "shape": shape}
    known |= {"frozen_head": False, "times_ms": [ms], "median_ms": ms, "tokens": 1024}
    return {**known, **dict.fromkeys(("sum_error_nat", "extra_bytes", "formula_bytes")), **more}


def axis_case(axis: str, unit: str, points: list[int], letter: str) -> dict[str, Any]:
    rows = []
    for x in points:
        shape = re.sub(rf"{letter}=\d+", f"{letter}={x}", "T=1024 D=256 V=8192 L=128 fp32")
        size, memory = x / points[0], 48 * 2**20
        memory = memory if axis == "tokens" else int(memory * (0.6 + 0.4 * size))
        common = {"shape": shape, "x": x, "full_chunks": x > points[1]}
        rows.append(row("lolkernels", 1 + 10.8 * size, **common, extra_bytes=memory))
        rows.append(row("gemms", 10 * size, **common))
        if x <= points[-2]:
            rows.append(row("eager", 1 + 17 * size, **common, extra_bytes=int(2**25 * size)))
    return {"title": axis, "axis": axis, "unit": unit, "floor": "gemms", "rows": rows}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    peers = [
        row("lolkernels", 108.0, sum_error_nat=7e-6),
        row("gemms", 100.0),
        row("eager", 127.0, sum_error_nat=2e-5),
        row("torch lce", 616.0, sum_error_nat=2e-5),
        row("cce no filter", 150.0, sum_error_nat=3e-5, version="25.1.1"),
        row("cce torch_compile", 140.0, sum_error_nat=3e-5, version="25.1.1"),
        row("trl", 0, median_ms=None, times_ms=[], skipped="not installed"),
    ]
    half = [
        row("lolkernels", 108.0, "bf16", label="lolkernels bf16", sum_error_nat=8e-6),
        row("eager", 70.0, "bf16", label="eager bf16", sum_error_nat=0.32),
        row("lolkernels", 109.0, label="lolkernels fp32", sum_error_nat=6e-6),
    ]
    cases = [{"title": "t", "floor": "gemms", "rows": rows} for rows in (peers, half)]
    scaling = [
        axis_case("tokens", "token", [256 << k for k in range(10)], "T"),
        axis_case("vocab", "column", [32768, 65536, 131072, 196608, 262144], "V"),
    ]
    common = {"environment": {"device": "Some CPU", "threads": 2}, "rounds": 3, "goals": []}
    return [{**common, "cases": found} for found in (cases, scaling)]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_off_or_overlaps(records, name: str, theme: str) -> None:
    style = next(t for t in plots.THEMES if t.name == theme)
    figure = plots.draw(records, name, style).figure
    FigureCanvasAgg(figure).draw()  # places the labels of the axes
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    assert len(boxes) >= 8
    for text, box in boxes:
        assert box.x0 >= 2 and box.x1 <= figure.bbox.x1 - 2, f"{text!r} leaves the figure"
        assert box.y0 >= 2 and box.y1 <= figure.bbox.y1 - 2, f"{text!r} leaves the figure"
        assert box.height / (1 + text.count("\n")) >= 9, f"{text!r} is small on a phone"
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert wide <= 1 or high <= 2, f"{one!r} and {other!r} overlap"


def test_the_same_records_give_the_same_bytes(records, tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, record in zip(paths, records, strict=True):
        path.write_text(json.dumps(record))
    found = []
    for turn in ("one", "two"):
        assert plots.main([*map(str, paths), "--out", str(tmp_path / turn / "cpu")]) == 0
        files = sorted((tmp_path / turn).iterdir())
        found.append({file.name: file.read_bytes() for file in files})
    assert found[0] == found[1]
    assert sorted(found[0]) == sorted(
        f"cpu-{name}-{theme}.svg" for name in NAMES for theme in ("light", "dark")
    )
    for name in NAMES:
        assert found[0][f"cpu-{name}-light.svg"] != found[0][f"cpu-{name}-dark.svg"]


def test_titles_follow_the_records(records) -> None:
    light = plots.THEMES[0]
    alt = {name: plots.draw(records, name, light).alt for name in NAMES}
    assert alt["floor"] == "lolkernels takes 1.08x the bare matrix products, eager PyTorch 1.27x"
    assert alt["error"].startswith("bf16: summed log-prob off by 8e-6 nat")
    assert alt["tokens"] == (
        "From 1k to 131k tokens, 128x as many: 125x the time, 1.00x the memory"
    )
    assert alt["vocab"].startswith("Vocabulary 196,608: 0.64x eager's time, 0.75x its memory")
    slower = copy.deepcopy(records)
    slower[0]["cases"][0]["rows"][0]["times_ms"] = [250.0]
    assert "takes 2.50x" in plots.draw(slower, "floor", light).alt


def test_a_peer_is_shown_by_its_fastest_variant_and_only_if_it_ran(records) -> None:
    figure = plots.draw(records, "floor", plots.THEMES[0]).figure
    said = {" ".join(t.get_text().split()) for t in figure.findobj(Text)}
    assert {"lolkernels", "eager PyTorch", "torch lce", "cce torch_compile 25.1.1"} <= said
    assert not [text for text in said if "no filter" in text or "trl" in text]
    assert {"1.08x", "1.27x", "1.40x", "6.16x"} <= said


def test_the_readme_gets_both_themes(records, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.json").write_text(json.dumps(records[0]))
    out = str(tmp_path / "cpu")
    assert plots.main([str(tmp_path / "a.json"), "--plots", "floor", "--out", out]) == 0
    said = capsys.readouterr().out
    assert '(prefers-color-scheme: dark)" srcset="' + out + "-floor-dark.svg" in said
    assert 'alt="lolkernels takes 1.08x' in said and out + "-floor-light.svg" in said


def rows_over(records: list[dict[str, Any]], axis: int) -> list[dict[str, Any]]:
    return records[1]["cases"][axis]["rows"]


def test_without_eager_the_vocabulary_plot_shows_ours_alone(records) -> None:
    case = records[1]["cases"][1]
    case["rows"] = [r for r in case["rows"] if r["contestant"] != "eager"]
    alt = plots.draw(records, "vocab", plots.THEMES[0]).alt
    assert alt == "Vocabulary 262,144: 182 MiB extra memory"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("tokens", lambda r: r[1]["cases"].pop(0), "scaling --axis tokens"),
        ("vocab", lambda r: r.pop(1), "scaling --axis vocab"),
        ("tokens", lambda r: [x.pop("extra_bytes") for x in rows_over(r, 0)], "no extra_bytes"),
        ("floor", lambda r: r[0]["cases"][0]["rows"].pop(1), "no row of the bare GEMMs"),
        ("floor", lambda r: r[0]["cases"].clear(), "run.py --suite cpu"),
        ("error", lambda r: [c["rows"].pop(0) for c in r[0]["cases"]], "sum_error_nat"),
    ],
)
def test_missing_data_names_the_command(records, name, spoil, message: str) -> None:
    spoil(records)
    with pytest.raises(plots.PlotError, match=message):
        plots.draw(records, name, plots.THEMES[0])


def test_bad_files_are_named(records, tmp_path: Path, capsys) -> None:
    assert plots.main([str(tmp_path / "none.json")]) == 2
    assert "none.json does not exist" in capsys.readouterr().err
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text("{}")
    assert plots.main([str(path)]) == 2
    assert "is no record of a benchmark" in capsys.readouterr().err
    path.write_text(json.dumps(records[0]))
    other.write_text(json.dumps(records[1] | {"environment": {"device": "Other"}}))
    assert plots.main([str(path), str(other)]) == 2
    assert "several devices (Other, Some CPU)" in capsys.readouterr().err


def test_colours_stand_out_from_the_paper() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for theme in plots.THEMES:
        paper = luminance(theme.paper)
        for color in (theme.ink, theme.muted, *theme.colors.values()):
            low, high = sorted([paper, luminance(color)])
            assert (high + 0.05) / (low + 0.05) >= 4.5, (theme.name, color)


def test_a_plot_names_the_threads_of_its_own_record(records) -> None:
    records[1]["environment"] = {"device": "Some CPU", "threads": 1}
    for name, want in (("floor", "Some CPU, 2 threads"), ("tokens", "Some CPU, 1 thread")):
        figure = plots.draw(records, name, plots.THEMES[0]).figure
        said = [" ".join(t.get_text().split()) for t in figure.texts]
        assert any(text.endswith(want) for text in said), said


def test_a_cards_families_of_peers_stand_in_one_plot_each_by_its_own_rounds() -> None:
    families = {"peers a": {"eager": 30.0}, "peers b": {"liger": 80.0}}
    cases = []
    for name, others in families.items():
        ours, floor = (20.0, 10.0) if name == "peers a" else (42.0, 20.0)
        rows = [row("lolkernels", ours, label="triton"), row("gemms", floor)]
        rows += [row(peer, ms) for peer, ms in others.items()]
        cases.append({"name": name, "title": name, "floor": "gemms", "rows": rows})
    record = {"environment": {"device": "a card", "cuda": "13"}, "cases": cases}
    found, _ = plots.peers_case([record], lambda row: True, "a time")
    ratios = {r["contestant"]: r["times_ms"][0] / r["floor_ms"][0] for r in found}
    assert ratios == {"lolkernels": 2.1, "gemms": 1.0, "eager": 3.0, "liger": 4.0}
    alone = [{**case, "rows": case["rows"][:2]} for case in cases]
    with pytest.raises(plots.PlotError, match="no peer has a time"):
        plots.draw([{**record, "cases": alone}], "floor", plots.THEMES[0])
    drawn = plots.draw([record], "floor", plots.THEMES[0])
    assert drawn.alt == "lolkernels takes 2.00x the bare matrix products, eager PyTorch 3.00x"
    shown = {text.get_text() for text in drawn.figure.findobj(Text)}
    assert {"2.00x", "3.00x", "4.00x"} <= shown
