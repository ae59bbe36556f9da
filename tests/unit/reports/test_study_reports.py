"""Figures show the numbers, tables and sentences say them."""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from mtp_modules.reports import figures
from mtp_modules.reports.look import key_label, series_style
from mtp_modules.reports.needed import needed, reached_at
from mtp_modules.reports.page import STYLE
from mtp_modules.reports.study_page import write_report
from mtp_modules.reports.study_verdicts import data_needed, difference
from mtp_modules.reports.tables import Table, across, number, results
from mtp_modules.reports.tables import data_needed as needed_table
from mtp_modules.studies import Outcome
from tests.pages import Outline
from tests.unit.studies.tiny import outcome

SWEEP: dict[str, Any] = {"key": "data.init_args.num_train", "label": "rows", "values": [10, 100, 1000]}


def seeds(*values: float, key: str = "loss/head_1") -> list[dict[str, float]]:
    return [{key: value} for value in values]


def two_arms(key: str = "loss/head_1") -> Outcome:
    """Return arms of which the second is worse by 1.0 +- 0.1 and the third is all over the place."""
    finals = {
        "one": [seeds(2.0, 3.0, 4.0, key=key)],
        "two": [seeds(3.0, 3.9, 5.1, key=key)],
        "three": [seeds(9.0, 1.0, 2.0, key=key)],
    }
    return outcome(finals)


def swept() -> Outcome:
    """Return losses that fall by 1 a decade; the second arm needs ten times, the third half of the data."""
    first = [[{"loss/head_1": 5.0 - decade, "tokens": 10.0**decade}] * 2 for decade in (1, 2, 3)]
    second = [[{"loss/head_1": 6.0 - decade, "tokens": 10.0**decade}] * 2 for decade in (1, 2, 3)]
    gain = math.log10(2)
    third = [[{"loss/head_1": 5.0 - decade - gain, "tokens": 10.0**decade}] * 2 for decade in (1, 2, 3)]
    return outcome({"one": first, "two": second, "three": third}, sweep=SWEEP)


def test_a_curve_shows_mean_and_interval() -> None:
    figure = figures.curves(two_arms(), y="loss/head_1", x="examples")
    (axes,) = figure.get_axes()
    assert [line.get_label() for line in axes.lines] == ["one", "two", "three"]
    assert axes.lines[0].get_xdata().tolist() == [8.0, 16.0]
    assert axes.lines[0].get_ydata().tolist() == [4.0, 3.0]  # the mean over seeds; a step before, one more
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((3 - 4.3027 / 3**0.5, 4 + 4.3027 / 3**0.5), rel=1e-4)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("training rows seen", "loss of horizon 1, nats")


def test_arms_keep_their_colour_when_few_are_drawn() -> None:
    (axes,) = figures.curves(two_arms(), arms=["three"]).get_axes()
    (line,) = axes.lines
    assert line.get_color() == series_style(2)[0]


def test_no_two_series_look_alike() -> None:
    assert len({series_style(index) for index in range(32)}) == 32


def test_a_sweep_is_drawn_against_its_values_or_against_what_it_took() -> None:
    outcome_ = swept()
    for x, label in ((None, "rows"), ("tokens", "training tokens seen")):
        (axes,) = figures.sweep(outcome_, x=x).get_axes()
        assert axes.lines[1].get_xdata().tolist() == [10.0, 100.0, 1000.0]
        assert axes.lines[1].get_ydata().tolist() == [5.0, 4.0, 3.0]
        assert axes.get_xlabel() == label
        assert axes.get_xscale() == "log"
    (axes,) = figures.curves(outcome_, value=10).get_axes()
    assert axes.lines[0].get_ydata().tolist() == [5.0, 4.0]
    with pytest.raises(ValueError, match="figure 'sweep': study 'tiny' has no sweep; use 'curves', or add a sweep"):
        figures.sweep(two_arms())


def heads(*shares: float) -> dict[str, float]:
    found = {f"accuracy/head_{h}": share for h, share in enumerate(shares, start=1)}
    return found | {f"loss/head_{h}": 1.0 for h in range(1, len(shares) + 1)}


def test_bars_stand_for_every_horizon() -> None:
    asked = outcome({"one": [[heads(0.5), heads(0.7)]], "two": [[heads(0.8, 0.6), heads(0.8, 0.4)]]})
    (axes,) = figures.bars(asked).get_axes()
    found = [(round(bar.get_x() + bar.get_width() / 2), round(bar.get_height(), 6)) for bar in axes.patches]
    assert found == [(1, 0.6), (1, 0.8), (2, 0.5)]
    assert axes.get_ylim() == (0, 1)
    (axes,) = figures.bars(asked, zoom=True).get_axes()
    assert axes.get_ylim()[0] >= 0
    assert "axis does not start at 0" in axes.get_ylabel()


def test_the_heat_map_shows_the_mean_over_seeds() -> None:
    asked = outcome({"one": [[heads(0.5)] * 2], "two": [[heads(0.8, 0.6)] * 2]})
    axes, _ = figures.heat_map(asked).get_axes()  # one panel, as the first arm has one horizon, and the colours
    image = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.array_equal(image, np.array([[0.375, 0.5], [np.nan, 0.25]]), equal_nan=True)
    assert axes.get_title(loc="left") + axes.get_title() == "two, 2 seeds"
    with pytest.raises(ValueError, match="no arm has more than one horizon; give arms"):
        figures.heat_map(outcome({"one": [[heads(0.5)]]}))


def test_distance_shows_heads_and_what_is_written() -> None:
    written = {"written/distance_1": 0.9, "written/distance_2": 0.8, "written/distance_3": 0.7}
    asked = outcome({"one": [[heads(0.9) | written]], "two": [[heads(0.8, 0.6)]]})
    (axes,) = figures.distance(asked).get_axes()
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert {name: list(y) for name, y in lines.items()} == {
        "one, head": [0.9],
        "one, generated": [0.9, 0.8, 0.7],
        "two, head": [0.8, 0.6],
    }
    (axes,) = figures.distance(asked, log_error=True).get_axes()
    assert axes.lines[1].get_ydata() == pytest.approx([0.1, 0.2, 0.3])


def test_a_table_says_mean_and_interval() -> None:
    table = results(two_arms(), columns=["loss/head_1", "gone"])
    assert table.text()[:2] == [["one", "3.0 ± 2.5", "-"], ["two", "4.0 ± 2.6", "-"]]
    assert table.markdown().splitlines()[:2] == ["| arm | loss of horizon 1, nats | gone |", "| ---|---|--- |"]
    rows = list(csv.reader(io.StringIO(table.csv())))
    assert rows[0] == ["arm", *(f"loss of horizon 1, nats{end}" for end in ("", " low", " high", " n")), "gone"]
    assert [float(entry) for entry in rows[1][1:5]] == pytest.approx([3.0, 0.5159, 5.4841, 3], abs=1e-4)


def test_a_table_across_the_sweep() -> None:
    table = across(swept(), key="loss/head_1")
    assert [column.title for column in table.columns] == ["arm \\ rows", "10", "100", "1000"]
    assert table.text()[0] == ["one", "4", "3", "2"]
    every = results(swept(), columns=["loss/head_1"], every_value=True)
    assert every.text()[:3] == [["one", "10", "4"], ["one", "100", "3"], ["one", "1000", "2"]]
    with pytest.raises(ValueError, match="table 'across': study 'tiny' has no sweep"):
        across(two_arms(), key="loss/head_1")


def test_figures_of_other_data_have_their_name_before_them() -> None:
    table = results(two_arms(), columns=["other: loss/head_1"])
    assert table.columns[1].title == "other: loss of horizon 1, nats"
    assert table.text()[0][1] == "6.0 ± 5.0"


@pytest.mark.parametrize(
    ("value", "uncertainty", "expected"),
    [(13.922, 6.279, "13.9"), (0.01213, 0.00091, "0.01213"), (30590.0, 1314.0, "30590"), (1.0, 0.25, "1.00")],
)
def test_two_digits_of_the_uncertainty_are_kept(value: float, uncertainty: float, expected: str) -> None:
    assert number(value, "loss/head_1", precise_to=uncertainty) == expected


def test_html_is_escaped() -> None:
    page = Table("t", results(two_arms(), columns=[]).columns, [["<b>&"]]).html()
    assert "&lt;b&gt;&amp;" in page


NUMBERS = {
    ("flops", 1.234e12): "1.23T",
    ("tokens", 999.0): "999",
    ("parameters", 12_345.0): "12.3k",
    ("accuracy/head_1", 0.98765): "98.8%",
    ("m = 6: answer/exact", 0.5): "50.0%",
    ("loss/head_1", 1.23456): "1.235",
    ("tokens_per_second", 12345.6): "12.3k",
}


@pytest.mark.parametrize(("given_", "expected"), NUMBERS.items(), ids=[key for key, _ in NUMBERS])
def test_numbers_are_written_as_people_do(given_: tuple[str, float], expected: str) -> None:
    assert number(given_[1], given_[0]) == expected


def test_a_sure_difference_is_told_from_noise() -> None:
    assert difference(two_arms()) == (
        "Loss of horizon 1, nats: one has 3.0 ± 2.5. Worse: two (+1.00 ± 0.25). "
        "Not distinguishable from it: three (+1 ± 13)."
    )
    assert "Better: two (+1.00 ± 0.25)." in difference(two_arms("accepted_length"), key="accepted_length")
    assert "Not distinguishable from it: two" in difference(two_arms(), worth=1.5)
    assert difference(two_arms(), to="two", arms=["one"]) == (
        "Loss of horizon 1, nats: two has 4.0 ± 2.6. Better: one (-1.00 ± 0.25)."
    )
    assert "three" in difference(two_arms(), to="two")


def test_differences_of_shares_are_points() -> None:
    asked = outcome({"one": [seeds(0.5, 0.6, key="accuracy/head_1")], "two": [seeds(0.4, 0.49, key="accuracy/head_1")]})
    assert "two (-10.5 ± 6.4 points)." in difference(asked, key="accuracy/head_1")


def test_one_seed_tells_nothing_apart() -> None:
    said = difference(outcome({"one": [seeds(1.0)], "two": [seeds(9.0)]}))
    assert said == "Loss of horizon 1, nats: one has 1. Not distinguishable from it: two (+8)."


def test_data_needed_for_the_same_loss() -> None:
    found = swept()
    ten, half = (needed(found, arm, key="loss/head_1", x="tokens", target=None) for arm in ("two", "three"))
    assert (ten.words, half.words) == ("10.00 [10.00, 10.00]", "0.50 [0.50, 0.50]")
    assert needed(found, "two", key="loss/head_1", x="value", target=3.5).words == "10.00 [10.00, 10.00]"
    assert needed(found, "two", key="loss/head_1", x="tokens", target=1.9).words == "an unknown number of"
    assert needed_table(found).text() == [["two", "10.00 [10.00, 10.00]"], ["three", "0.50 [0.50, 0.50]"]]


def test_a_bound_is_told_as_one() -> None:
    """The first arm is better from its first point on than the other is in the end, and the other way round."""
    good = [[{"loss/head_1": 1.0 - x / 10, "tokens": 10.0**x}] for x in (1, 2, 3)]
    bad = [[{"loss/head_1": 9.0 - x / 10, "tokens": 10.0**x}] for x in (1, 2, 3)]
    assert needed(
        outcome({"g": good, "b": bad}, sweep=SWEEP), "b", key="loss/head_1", x="tokens", target=None
    ).words == ("more than 100")
    assert needed(
        outcome({"b": bad, "g": good}, sweep=SWEEP), "g", key="loss/head_1", x="tokens", target=None
    ).words == ("less than 0.01")


@pytest.mark.parametrize(
    ("arm", "claimed", "judged"),
    [
        ("two", 0.33, "not supported, more is needed."),
        ("three", 0.33, "less is needed, but not as little as claimed."),
        ("three", 0.6, "supported."),
    ],
)
def test_a_claim_is_judged(arm: str, claimed: float, judged: str) -> None:
    said = data_needed(swept(), arm=arm, claimed=claimed)
    assert said.startswith("To reach the same level in loss of horizon 1, nats, " + arm)
    assert said.endswith(f"The claim is {claimed}: {judged}")


def test_one_seed_judges_no_claim() -> None:
    found = swept()
    single = Outcome(found.study, [one for one in found.results if one["seed"] == 1], [], found.about)
    assert data_needed(single, arm="two", claimed=0.33).endswith(
        "(n = 1). The claim is 0.33: inconclusive with one seed."
    )


@given(
    st.lists(st.floats(0.1, 5), min_size=2, max_size=6),
    st.lists(st.floats(0.0, 2), min_size=2, max_size=6),
    st.floats(-5, 5),
)
def test_a_level_is_reached_where_the_curve_crosses_it(gaps: list[float], falls: list[float], level: float) -> None:
    size = min(len(gaps), len(falls))
    x = np.exp(np.cumsum(gaps[:size]))
    y = 4 - np.cumsum(falls[:size])
    low, high = reached_at(x.tolist(), y.tolist(), level)
    if low == high:
        assert np.interp(math.log(low), np.log(x), y) == pytest.approx(level, abs=1e-6)
    elif low == 0.0:
        assert y[0] <= level
        assert high == x[0]
    else:
        assert y[-1] > level
        assert (low, high) == (x[-1], math.inf)


def test_every_key_has_words() -> None:
    for key in ("loss/head_3", "answer/exact", "written/distance_2", "flops", "decode/speedup", "m: accuracy/head_1"):
        assert key_label(key) != key


def test_the_report_is_one_page_that_needs_nothing(tmp_path: Path) -> None:
    asked = outcome({"N < 1": [[heads(0.5)] * 2], "N = 2": [[heads(0.8, 0.6)] * 2]})
    asked.missing.append("N = 2, seed 3")
    page = write_report(asked, tmp_path, "python -m mtp_modules study tiny --seeds 2")
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", text)
    outline = Outline(text)
    assert outline.tags.count("h1") == outline.tags.count("style") == 1
    assert STYLE in text  # the look of all pages
    assert text.count("data:image/svg+xml;base64,") == len(asked.study.figures)
    for part in ("Are two heads &lt; better", "They are &amp; &lt;b&gt;always&lt;/b&gt;.", "N &lt; 1", "--seeds 2"):
        assert part in text
    assert "No results: N = 2, seed 3." in text
    assert "processor abacus" in text
    assert "d_model: 16" in text
    images = sorted((tmp_path / "figures").glob("*.png"))
    assert [path.stem for path in images] == ["1-curves", "2-bars", "3-heat_map", "4-distance"]
    for path in images:
        pixels = imread(path)
        assert pixels.std() > 0.05, f"{path.name} is blank"
        assert path.with_suffix(".svg").read_text(encoding="utf-8").count("<path") > 10
    assert (tmp_path / "verdict.md").read_text(encoding="utf-8").startswith("- Accuracy of horizon 1: N < 1 has 50.0%")
    assert {path.name for path in (tmp_path / "tables").iterdir()} == {
        *("1-results.csv", "1-results.md", "runs.csv", "runs.md")
    }
