"""A report as one HTML file that needs nothing else: figures and films are inside it."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --paper: #fff; --tint: #f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d; --paper: #0d1117; --tint: #151b23 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 }
main { max-width: 74rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
p { max-width: 46rem } .soft { color: var(--soft) }
nav a { margin-right: 1rem; white-space: nowrap } a { color: inherit }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft); white-space: normal; vertical-align: bottom }
td.text, th.text { text-align: left }
td.text { white-space: normal; overflow-wrap: break-word; max-width: 24rem } td small { color: var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 1rem }
figure { margin: 0; max-width: 36rem } figcaption { color: var(--soft); font-size: .88rem; margin-top: .3rem }
figure img { display: block; box-sizing: border-box; width: 100%; background: #fff; padding: .5rem;
  border: 1px solid var(--line); border-radius: 8px }
video { width: 100%; border-radius: 8px; background: #000 }
.films { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 1rem }
code { background: var(--tint); padding: .1rem .3rem; border-radius: 4px; font-size: .85em; overflow-wrap: anywhere }
"""


def embed(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def escaped(cell: str) -> str:
    """What stands in brackets goes below, smaller."""
    return escape(cell).replace(" [", "<br><small>[").replace("]", "]</small>") if cell.endswith("]") else escape(cell)


def table(header: list[str], rows: Iterable[list[str]], text: set[str]) -> str:
    """The columns named in `text` are set to the left."""
    classes = [' class="text"' if name in text else "" for name in header]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, classes, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{escaped(cell)}</td>" for cell, kind in zip(row, classes, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def paragraph(text: str, soft: bool = False) -> str:
    return f"<p{' class=soft' if soft else ''}>{escape(text)}</p>"


def pictures(about: dict[Path, str]) -> str:
    """Side by side where there is room, each with its caption."""
    shown = (
        f'<figure><img src="{embed(path, "image/png")}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for path, caption in about.items()
    )
    return f'<div class="figures">{"".join(shown)}</div>'


def films(videos: dict[str, Path]) -> str:
    shown = (
        f'<div><video controls muted loop playsinline src="{embed(path, "video/mp4")}"></video>'
        f'<div class="soft">{escape(title)}</div></div>'
        for title, path in videos.items()
    )
    return f'<div class="films">{"".join(shown)}</div>'


def page(title: str, subtitle: str, sections: dict[str, str]) -> str:
    links = " ".join(f'<a href="#s{k}">{escape(name)}</a>' for k, name in enumerate(sections))
    body = "".join(f'<h2 id="s{k}">{escape(name)}</h2>{text}' for k, (name, text) in enumerate(sections.items()))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(title)}</h1>{paragraph(subtitle, soft=True)}<nav>{links}</nav>{body}</main></body></html>\n"
    )
