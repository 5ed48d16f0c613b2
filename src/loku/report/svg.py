"""Turn Vega's SVG into SVG that lives inside a page: its colours and fonts, unique ids, a text alternative."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping

import vl_convert
from markupsafe import Markup

from loku.report.figures import Value

SVG = "http://www.w3.org/2000/svg"
ET.register_namespace("", SVG)

# Charts are drawn with stand-in colours; the page's style sheet gives them their value in light, dark and print.
INK, MUTED, LINE, TARGET, UNLEARNED, RETAIN_ONLY, HEAT, PAGE = (f"#01020{digit}" for digit in range(1, 9))
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    TARGET: "var(--target)",
    UNLEARNED: "var(--unlearned)",
    RETAIN_ONLY: "var(--retain-only)",
    HEAT: "var(--heat)",
    PAGE: "var(--page)",
}

CONFIG = {
    "background": None,
    "font": "sans-serif",
    "view": {"stroke": None},
    "axisY": {"minExtent": 34},  # charts that stand side by side get plots of the same size
    "axis": {
        "domainColor": LINE,
        "gridColor": LINE,
        "gridOpacity": 0.6,
        "tickColor": LINE,
        "tickSize": 4,
        "labelColor": MUTED,
        "labelFlush": False,
        "labelFontSize": 11,
        "titleColor": MUTED,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 7,
    },
}


def render(specification: dict, name: str, title: str, description: str) -> Markup:
    """Draw a Vega-Lite specification, offline and in this process.

    `name` makes the ids inside the page unique; `title` and `description` are what a screen reader says.
    """
    specification = {**specification, "config": CONFIG}
    root = ET.fromstring(vl_convert.vegalite_to_svg(specification, allowed_base_urls=[]))
    _clean(root)
    _rename(root, name)
    root.set("role", "img")
    root.set("class", "chart")
    root.set("aria-labelledby", f"{name}-title {name}-desc")
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ET.Element(f"{{{SVG}}}{tag}", {"id": f"{name}-{tag}"})
        element.text = text
        root.insert(position, element)
    return Markup(ET.tostring(root, encoding="unicode"))


def _clean(element: ET.Element) -> None:
    """Drop what only Vega's own runtime needs, and hand colours over to the style sheet."""
    for name in list(element.attrib):
        if name in ("class", "role", "pointer-events", "font-family", "version") or name.startswith("aria-"):
            del element.attrib[name]
    styles = []
    for name in ("fill", "stroke"):
        variable = VARIABLES.get(element.get(name, ""))
        if variable:
            del element.attrib[name]
            styles.append(f"{name}:{variable}")
    if styles:
        element.set("style", ";".join(styles))
    for name in ("d", "transform", "x2", "y2", "fill-opacity"):
        if name in element.attrib:
            element.set(name, re.sub(r"-?\d*\.\d+(?:e[-+]?\d+)?", _round, element.attrib[name]))
    for child in list(element):
        _clean(child)
        tag = child.tag.removeprefix(f"{{{SVG}}}")
        hidden = child.get("display") == "none" or (tag in ("path", "rect") and not _painted(child))
        if hidden or (tag == "g" and not len(child)):
            element.remove(child)


def _painted(element: ET.Element) -> bool:
    # Vega paints nothing by inheritance, so a shape without its own paint is one of its invisible hit areas.
    own = element.get("fill", "none") not in ("none", "transparent") or element.get("stroke", "none") != "none"
    return own or "style" in element.attrib


def _round(match: re.Match[str]) -> str:
    text = f"{float(match.group()):.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _rename(root: ET.Element, name: str) -> None:
    """Prefix every id with the chart's name, and every reference to it."""
    ids = {value for element in root.iter() if (value := element.get("id"))}
    for element in root.iter():
        for attribute, value in list(element.attrib.items()):
            if attribute == "id":
                element.set(attribute, f"{name}-{value}")
            for identifier in ids:
                if f"url(#{identifier})" in value:
                    element.set(attribute, value.replace(f"url(#{identifier})", f"url(#{name}-{identifier})"))


def strip(values: Mapping[str, Value]) -> Markup:
    """Draw three models on a line from 0 to 1: ring target, dot with its interval unlearned, upright bar retain-only.

    The numbers stand beside it, so it is hidden from screen readers.
    """

    def x(value: float) -> str:
        return f"{5 + 110 * min(1.0, max(0.0, value)):.1f}"

    target, unlearned, aim = (values.get(role) for role in ("target", "unlearned", "retain_only"))
    parts = ['<path class="axis" d="M5 9H115M5 6.5V11.5M115 6.5V11.5"/>']
    if aim:
        parts.append(f'<path class="aim" d="M{x(aim.mean)} 1.5V16.5"/>')
    if target:
        parts.append(f'<circle class="before" cx="{x(target.mean)}" cy="9" r="3.7"/>')
    if unlearned:
        if unlearned.low is not None and unlearned.high is not None:
            parts.append(f'<path class="span" d="M{x(unlearned.low)} 9H{x(unlearned.high)}"/>')
        parts.append(f'<circle class="after" cx="{x(unlearned.mean)}" cy="9" r="3.7"/>')
    opening = '<svg class="strip" viewBox="0 0 120 18" width="120" height="18" aria-hidden="true">'
    return Markup(opening + "".join(parts) + "</svg>")
