"""The tables, read back."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

from finetune.evaluation import tables
from finetune.evaluation.tables import Figure, State, Table

LIKENESS = Figure("likeness", "DINO", 0.5, 0.4, 0.6, 3, "DINO a|b", "mean cosine; higher is more alike", (0.4, 0.6))
NOTHING = Figure("diversity", "DIV", math.nan, math.nan, math.nan, 0, "LPIPS", "distance", (math.nan,))
TABLE = Table(
    "run, one",
    "short",
    [State("base", 0, {"likeness": LIKENESS}), State("result", 9, {"likeness": LIKENESS, "diversity": NOTHING})],
    {"seed": 1},
    [[0.9, 0.1], [0.2, 0.8]],
    ["dog", "cat"],
)


def test_json_reads_back() -> None:
    text = tables.to_json(TABLE, verdict={"word": "good"})
    assert "NaN" not in text and '"word": "good"' in text
    back = tables.from_json(text)
    assert back.states[0] == State("base", 0, {"likeness": LIKENESS}, [])
    assert math.isnan(back.states[1].value("diversity")) and math.isnan(back.states[0].value("diversity"))
    assert replace(back, states=[]) == replace(TABLE, states=[])


def test_csv_has_a_line_for_each_figure() -> None:
    lines = list(csv.DictReader(io.StringIO(tables.to_csv([TABLE]))))
    assert [(line["run"], line["state"], line["measure"], line["value"]) for line in lines] == [
        ("run, one", "base", "likeness", "0.500000"),
        ("run, one", "result", "likeness", "0.500000"),
        ("run, one", "result", "diversity", ""),
    ]
    assert lines[0]["judge"] == "DINO a|b"


def test_markdown_tells_judge_and_scale_of_each_measure() -> None:
    text = tables.to_markdown(TABLE)
    assert "| state | DINO | DIV |" in text
    assert "| base | 0.500 (0.400 to 0.600) |  |" in text and "| result | 0.500 (0.400 to 0.600) | - |" in text
    assert "- DINO: mean cosine; higher is more alike. Measured with DINO a\\|b." in text
    assert "| prompts of | like dog | like cat |" in text and "| cat | 0.200 | 0.800 |" in text
