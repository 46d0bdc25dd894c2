"""The shell of a report page, its style, and how figures are written for a person."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from moesim.output.charts import BASE, BEST, INK, LIMIT, MUTED

# Everything is in the one file: no script, no font, no network.
_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f6f7f9; color: {INK};
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
main, header {{ max-width: 1200px; margin: 0 auto; padding: 0 24px; }}
header {{ padding-top: 28px; }}
h1 {{ font-size: 26px; line-height: 1.25; margin: 2px 0 6px; letter-spacing: -0.01em; }}
h2 {{ font-size: 18px; margin: 0 0 4px; }}
h3 {{ font-size: 14px; margin: 0 0 4px; }}
p {{ margin: 0 0 10px; max-width: 92ch; }}
p, li, h1, h3 {{ overflow-wrap: break-word; }}
.eyebrow {{ color: {MUTED}; font-size: 13px; margin: 0; }}
.lead {{ color: {MUTED}; margin-bottom: 14px; }}
section {{ background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 20px 22px; margin: 16px 0; }}
.verdict {{ border-left: 6px solid {MUTED}; }}
.verdict.good {{ border-left-color: #1f7a4d; }}
.verdict.no {{ border-left-color: {BASE}; }}
.verdict p {{ font-size: 17px; line-height: 1.5; margin: 0; max-width: 100ch; }}
.badge {{ display: inline-block; border-radius: 4px; padding: 1px 9px; font-size: 13px; font-weight: 600;
  background: #e8ebef; color: {INK}; margin-bottom: 8px; }}
.good .badge {{ background: #dcf1e5; color: #14532f; }}
.no .badge {{ background: #fbe7da; color: #7a3407; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 16px 0; }}
.tile {{ background: #fff; border: 1px solid #dfe3e8; border-radius: 8px; padding: 12px 16px; }}
.tile dt {{ color: {MUTED}; font-size: 13px; }}
.tile dd {{ margin: 0; font-size: 24px; font-weight: 600; letter-spacing: -0.01em;
  font-variant-numeric: tabular-nums; }}
.tile dd small {{ display: block; font-size: 13px; font-weight: 400; color: {MUTED}; letter-spacing: 0; }}
.two {{ display: grid; grid-template-columns: 1fr 1fr; gap: 4px 22px; }}
.three {{ display: grid; grid-template-columns: 1fr 1fr 1fr; gap: 18px; }}
.two > *, .three > * {{ min-width: 0; }}
@media (max-width: 860px) {{ .two, .three {{ grid-template-columns: 1fr; }} }}
svg {{ width: 100%; height: auto; display: block; overflow: visible; font-family: inherit; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th {{ text-align: right; font-weight: 600; color: {MUTED}; vertical-align: bottom; padding: 6px 9px;
  border-bottom: 2px solid #d5dae0; }}
td {{ text-align: right; padding: 7px 9px; border-bottom: 1px solid #e9ecef; vertical-align: top; }}
th:first-child, td:first-child {{ text-align: left; min-width: 172px; }}
th.text, td.text {{ text-align: left; }}
td .iv {{ display: block; color: {MUTED}; font-size: 12px; white-space: nowrap; }}
td data {{ font-weight: 600; }}
tr.best td {{ background: #eef4fb; }}
tr.base td {{ background: #fdf4ee; }}
tr td .role {{ display: block; font-size: 12px; font-weight: 600; color: {MUTED}; white-space: nowrap; }}
tr td .under {{ display: block; font-size: 12px; color: {MUTED}; }}
tr.best .role {{ color: {BEST}; }}
tr.base .role {{ color: {BASE}; }}
.whisker {{ width: 96px; height: 10px; margin: 2px 0 0 auto; }}
.met {{ color: #14532f; }} .missed {{ color: {LIMIT}; font-weight: 600; }}
.key {{ display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; padding: 0; list-style: none; font-size: 13px;
  color: {MUTED}; }}
.swatch {{ display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px;
  vertical-align: -1px; }}
.note {{ color: {MUTED}; font-size: 13.5px; }}
pre {{ background: #f3f5f7; border-radius: 6px; padding: 12px 14px; overflow-x: auto; font-size: 12.5px;
  line-height: 1.5; margin: 6px 0 12px; }}
code, pre {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }}
details {{ margin-top: 10px; font-size: 14px; }}
summary {{ cursor: pointer; color: {BEST}; }}
ul {{ margin: 4px 0 8px; padding-left: 20px; }}
li {{ margin: 3px 0; max-width: 96ch; }}
footer {{ color: {MUTED}; font-size: 13px; padding: 4px 0 36px; }}
@media print {{ body {{ background: #fff; }} section {{ break-inside: avoid; }} }}
"""


def page(title: str, head: str, sections: Sequence[str], foot: str) -> str:
    """A whole HTML document."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<link rel="icon" href="data:,"/><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><header>{head}</header>\n<main>\n"
        + "\n".join(part for part in sections if part)
        + f"\n<footer>{foot}</footer></main></body></html>\n"
    )


def section(name: str, title: str, body: str, *, lead: str = "") -> str:
    """A section with its anchor; lead says what to look for."""
    told = f'<p class="lead">{lead}</p>' if lead else ""
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{told}{body}</section>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, classes: Sequence[str] | None = None) -> str:
    """A table of cells that are already HTML; classes: one for each row."""
    tops = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for index, row in enumerate(rows):
        named = f' class="{classes[index]}"' if classes and classes[index] else ""
        body.append(f"<tr{named}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{tops}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def key(items: Sequence[tuple[str, str]]) -> str:
    """A legend of (name, colour)."""
    shown = (
        f'<li><span class="swatch" style="background:{colour}"></span>{escape(name)}</li>' for name, colour in items
    )
    return f'<ul class="key">{"".join(shown)}</ul>'


def details(summary: str, body: str) -> str:
    """A part that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def number(value: float, digits: int = 3) -> str:
    """A figure with `digits` significant digits, no exponent, thousands parted: `1,234`, `0.0123`."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "-"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}"


def exact(value: float, shown: str) -> str:
    """A figure as shown, with the stored one beside it for machines."""
    return f'<data value="{value!r}">{escape(shown)}</data>'


def percent(share: float) -> str:
    """A share: `29 %`, `under 1 %`."""
    return "under 1 %" if 0 < share < 0.005 else f"{share * 100:.0f} %"


def signed(value: float) -> str:
    """A relative difference: `+4.8 %`."""
    return f"{value * 100:+.1f} %".replace("-", "\u2212")
