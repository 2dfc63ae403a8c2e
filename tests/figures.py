"""What every picture is held to: nothing lies outside or overlaps, and the theme is kept."""

from matplotlib.colors import to_hex

from minicnn.plots import THEMES


def visible_texts(figure):
    """All texts with something in them, and their boxes in pixels."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return {text: text.get_window_extent() for text in texts}


def hidden_ticks(figure):
    """Labels of ticks beyond the ends of an axis, which Matplotlib keeps but does not draw."""
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                if not (ax.axison and low <= tick.get_loc() <= high):
                    hidden |= {tick.label1, tick.label2}
    return hidden


def assert_legible(figure, theme):
    """All texts are inside of the figure, apart from each other, and not too small."""
    assert to_hex(figure.get_facecolor()) == THEMES[theme].paper
    boxes = visible_texts(figure)
    for text in hidden_ticks(figure):
        boxes.pop(text, None)
    assert boxes
    for text, box in boxes.items():
        label = text.get_text()
        assert figure.bbox.padded(1).contains(box.x0, box.y0), label
        assert figure.bbox.padded(1).contains(box.x1, box.y1), label
        assert text.get_fontsize() >= 7, label
    items = list(boxes.items())
    for i, (text, box) in enumerate(items):
        for other, other_box in items[:i]:
            overlap = box.padded(-1).overlaps(other_box.padded(-1))
            assert not overlap, (text.get_text(), other.get_text())
