"""What stands in pictures: each bar's states and number, what each saving is of, and every marker, whole."""

import pytest

from lowbit_dist import charts

# Bytes per parameter, as a small run has them: its codes are a sliver of the bar.
BARS = {
    "this run, 8-bit states": {
        "low_bit_weights": 0.2, "scales": 0.001, "other_weights": 1.2, "gradients": 4.0,
        "optimizer_states": 2.03,
    },
    "dense, 8-bit states": {"other_weights": 4.0, "gradients": 4.0, "optimizer_states": 2.03},
    "dense, fp32 states": {"other_weights": 4.0, "gradients": 4.0, "optimizer_states": 8.0},
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """`drawn(charts.memory_bars, ...)`: the figure, laid out, that is saved otherwise."""

    def draw(function, *arguments, **options):
        figures = []
        with monkeypatch.context() as patch:
            patch.setattr(charts, "_saved", lambda figure, path: figures.append(figure))
            function(*arguments, "picture.png", **options)
        (figure,) = figures
        figure.draw_without_rendering()
        return figure

    return draw


def is_inside(extent, box):
    return box.x0 <= extent.x0 and extent.x1 <= box.x1 and box.y0 <= extent.y0 and extent.y1 <= box.y1


def test_a_bar_has_its_states_its_codes_their_number_and_each_saving_what_it_is_of(drawn):
    figure = drawn(charts.memory_bars, BARS)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == list(BARS)
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("0.20") == 1, "the number of the codes, in a bar that is too narrow for it"
    assert [text for text in texts if "%" in text] == [
        "this run: 26% less than this",
        "this run: 54% less than this",
    ]
    for total in ("7.43", "10.03", "16.00"):
        assert total in texts
    assert all(is_inside(text.get_window_extent(), figure.bbox) for text in axes.texts)


def test_a_legend_lists_what_can_be_found_in_a_bar(drawn):
    figure = drawn(charts.memory_bars, BARS)
    (legend,) = figure.legends
    shown = ["low_bit_weights", "other_weights", "gradients", "optimizer_states"]
    assert [text.get_text() for text in legend.get_texts()] == [charts.COMPONENTS[name][0] for name in shown]
    text = charts.memory_bars_text(BARS, width=40)
    assert [name for name, (words, _, _) in charts.COMPONENTS.items() if words in text] == [
        "other_weights", "gradients", "optimizer_states"
    ], "0.2 of 16 bytes has no cell of 40"  # fmt: skip


def test_a_run_that_saves_nothing_claims_nothing(drawn):
    larger = {"this run": {"gradients": 4.0}, "dense": {"gradients": 3.0}}
    texts = [text.get_text() for text in drawn(charts.memory_bars, larger).axes[0].texts]
    assert not [text for text in texts if "less" in text]


def test_no_marker_is_cut_and_each_point_says_how_many_seeds_it_has(drawn):
    def point(n_bytes, loss, spread, n):
        return {
            "bytes": {"mean": n_bytes, "spread": None, "n": n},
            "val_loss": {"mean": loss, "spread": spread, "n": n},
        }

    groups = {"ternary": point(0.01, 4.2, 0.1, 2), "dense": point(16.0, 4.0, None, 1)}
    figure = drawn(charts.loss_against_bytes, groups, colours=charts.colours([*groups]), words="bytes")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_xscale()) == ("bytes", "log")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ternary (2 seeds)", "dense (1 seed)"]
    for container in axes.containers:
        marker = container.lines[0]
        extent = marker.get_window_extent()
        assert is_inside(extent, figure.bbox)
        assert is_inside(extent, axes.bbox) or not marker.get_clip_on(), marker.get_label()


def test_flip_rates_have_their_unit_and_are_told_apart(drawn):
    layers = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    few, many = dict.fromkeys(layers, 0.01), dict.fromkeys(layers, 0.4)
    for groups, scale in (({"ternary": few}, "linear"), ({"ternary": few, "int8": many}, "log")):
        (axes,) = drawn(charts.layer_curves, groups, colours=charts.colours([*groups])).axes
        assert axes.get_ylabel() == "share of its codes that change in a step"
        assert axes.get_yscale() == scale
    nothing = {"ternary": dict.fromkeys(layers, 0.0), "int8": many}
    (axes,) = drawn(charts.layer_curves, nothing, colours=charts.colours([*nothing])).axes
    assert axes.get_yscale() == "linear", "zero has no logarithm"
    rows = [{"step": step, "layers": {name: {"flip_rate": 0.1} for name in layers}} for step in (1, 2)]
    assert drawn(charts.layer_heat, rows).axes[1].get_ylabel() == "share of its codes that change in a step"
