"""Previews as one HTML page: images inside, no script, nothing fetched; opens from a disk or a mail."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from html import escape

from PIL import Image

from ilvr_ds.data.preview import Preview, PreviewImage, TokenRun, one_line

_STYLE = """
:root{--paper:#f6f5f1;--card:#fff;--ink:#20242c;--soft:#6b7280;--line:#e3e1da;--prompt:#eef0f3;
--on:#d5efdc;--on-ink:#14532d;--latent:#7c4dff;--latent-bg:#e9e0ff;--image:#2f7fd3;--image-bg:#dcebfb;--mark:#9aa1ad}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--card:#1d2026;--ink:#e6e7ea;--soft:#9aa1ad;--line:#2e323a;
--prompt:#272b33;--on:#173a26;--on-ink:#b9efca;--latent:#a98bff;--latent-bg:#322752;--image:#79b4f2;--image-bg:#1d3650;
--mark:#727987}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 28px 80px}
h1{font-size:26px;margin:0 0 4px;letter-spacing:-.01em}
.about{color:var(--soft);margin:0 0 18px}
.key{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:8px 18px;padding:10px 0;margin-bottom:22px;
background:var(--paper);border-bottom:1px solid var(--line);font-size:13px;color:var(--soft)}
.key i{display:inline-block;width:14px;height:14px;border-radius:4px;margin-right:6px;vertical-align:-2px}
article{background:var(--card);border:1px solid var(--line);border-radius:14px;margin:0 0 28px;overflow:hidden;
box-shadow:0 1px 2px #0000000a,0 8px 24px #0000000a}
header{display:flex;flex-wrap:wrap;align-items:baseline;gap:4px 14px;padding:16px 22px 12px}
h2{font-size:17px;margin:0;overflow-wrap:anywhere}
h2 a{color:inherit;text-decoration:none}
.where{color:var(--soft);font-size:13px}
.facts{margin-left:auto;display:flex;flex-wrap:wrap;gap:6px}
.facts b{font-weight:600}
.facts span{font-size:12px;color:var(--soft);border:1px solid var(--line);border-radius:99px;padding:1px 10px}
.ribbon{display:flex;height:10px;background:var(--prompt)}
.ribbon i{display:block;height:100%}
section{padding:16px 22px}
section+section{border-top:1px solid var(--line)}
h3{margin:0 0 8px;font-size:11px;font-weight:600;letter-spacing:.09em;text-transform:uppercase;color:var(--soft)}
.said{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;max-width:78ch}
.prompt{display:flex;flex-wrap:wrap;gap:14px 20px;align-items:flex-start}
.prompt .said{flex:1 1 340px}
.board{display:grid;grid-template-columns:repeat(auto-fit,minmax(230px,1fr));gap:14px}
.step{display:flex;flex-direction:column;justify-content:space-between;gap:10px;background:var(--paper);
border-radius:10px;padding:12px 14px;font-size:14px}
.board.short{display:flex;flex-wrap:wrap}
.short .step{flex:0 1 320px}
.step.last{grid-column:1/-1;background:var(--on);color:var(--on-ink)}
.short .last{flex:1 1 300px;justify-content:flex-start}
figure{margin:0;display:flex;flex-direction:column;gap:6px}
figure img{display:block;max-width:100%;max-height:320px;width:auto;border-radius:8px;border:3px solid var(--image)}
figure.helper img{border-color:var(--latent)}
figcaption{font-size:12px;color:var(--soft)}
figure.helper figcaption b{color:var(--latent)} figure.input figcaption b{color:var(--image)}
.tokens{font:13px/2.05 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
.t{padding:2px 0;border-radius:3px;background:var(--prompt);box-shadow:inset 1px 0 var(--card);white-space:pre-wrap}
.s{background:var(--on);color:var(--on-ink)}
.m{color:var(--mark)} .s.m{color:var(--on-ink);font-weight:600}
.image,.latent{padding:2px 9px;margin:0 2px;border-radius:99px;white-space:nowrap;font-weight:600}
.image{background:var(--image-bg);color:var(--image)} .latent{background:var(--latent-bg);color:var(--latent)}
.nl{opacity:.45}
summary{cursor:pointer;font-size:11px;font-weight:600;letter-spacing:.09em;text-transform:uppercase;color:var(--soft);
margin-bottom:8px}
@media print{article{break-inside:avoid;box-shadow:none}.key{position:static}}
"""

_LEGEND = (
    ("var(--on)", "supervised: the loss asks for these tokens"),
    ("var(--prompt)", "given: no loss"),
    ("var(--image-bg)", "input-image pads"),
    ("var(--latent-bg)", "latent pads: targets come from the helper image"),
)
_COLOURS = {"image": "var(--image)", "latent": "var(--latent)"}


def write_page(previews: Iterable[Preview], title: str, about: str, image_side: int) -> Iterator[str]:
    """The page in pieces, one sample at a time (a page of many samples need not fit into memory).

    Args:
        image_side: pixels; larger images are scaled down on the page (captions give the true size).
    """
    legend = "".join(f'<span><i style="background:{colour}"></i>{text}</span>' for colour, text in _LEGEND)
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>\n"
        f'<h1>{escape(title)}</h1><p class="about">{escape(about)}</p><div class="key">{legend}</div>\n'
    )
    for preview in previews:
        yield _article(preview, image_side)
    yield "</main></body></html>\n"


def _article(preview: Preview, side: int) -> str:
    facts = [
        (preview.length, "tokens"),
        (preview.count(supervised=True), "supervised"),
        (preview.count("image"), "image"),
        (preview.count("latent"), "latent"),
        (len(preview.images), "pictures"),
    ]
    answer = "" if preview.answer is None else f"<section><h3>Answer</h3>{_said(preview.answer)}</section>"
    return (
        f'<article id="s{preview.number}"><header><h2><a href="#s{preview.number}">{escape(preview.id)}</a></h2>'
        f'<span class="where">number {preview.number} · {escape(preview.shard)} · key {escape(preview.key)} · '
        f'{escape(preview.origin)}</span><span class="facts">'
        + "".join(f"<span><b>{value}</b> {name}</span>" for value, name in facts)
        + f"</span></header>{_ribbon(preview.tokens)}"
        f'<section><h3>User</h3><div class="prompt">{_prompt(preview, side)}</div></section>'
        f"<section><h3>Assistant</h3>{_board(preview, side)}</section>{answer}"
        f'<section><details open><summary>Tokens</summary><div class="tokens">'
        + "".join(_token(run) for run in preview.tokens)
        + "</div></details></section></article>\n"
    )


def _prompt(preview: Preview, side: int) -> str:
    return "".join(_figure(p, side, "") if isinstance(p, PreviewImage) else _said(p) for p in preview.prompt)


def _board(preview: Preview, side: int) -> str:
    """The steps as a storyboard: a tile is a helper image under the text that leads to it; last the text after all."""
    tiles, said, span = [], "", 0
    for part in preview.steps:
        if isinstance(part, PreviewImage):
            span += 1
            note = f"<b>span {span}</b> · {preview.latent_size} latents, {part.tokens} candidates"
            tiles.append(f'<div class="step">{_said(said) if said.strip() else ""}{_figure(part, side, note)}</div>')
            said = ""
        else:
            said += part
    if said.strip():
        tiles.append(f'<div class="step last">{_said(said)}</div>')
    short = " short" if span <= 2 else ""  # one or two images leave room for the last text beside them
    return f'<div class="board{short}">{"".join(tiles)}</div>'


def _said(text: str) -> str:
    return f'<p class="said">{escape(text.strip())}</p>'


def _figure(image: PreviewImage, side: int, note: str) -> str:
    width, height = image.picture.size
    if image.role == "input":
        note = f"<b>{image.tokens} image tokens</b>"
    size = f"{escape(image.member)} · {width}×{height} · {image.stored_bytes / 1000:.0f} kB"
    return (
        f'<figure class="{image.role}"><img alt="{escape(image.member)}" '
        f'src="{_data_url(image.picture, side)}"><figcaption>{note}<br>{size}</figcaption></figure>'
    )


def _data_url(picture: Image.Image, side: int) -> str:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    best = b""
    for kind, options in (("PNG", {"optimize": True}), ("JPEG", {"quality": 88})):
        buffer = io.BytesIO()
        small.save(buffer, kind, **options)
        if not best or buffer.tell() < len(best) // 2:  # drawings stay sharp; photographs do not fill the page
            best, media = buffer.getvalue(), kind.lower()
    return f"data:image/{media};base64,{base64.b64encode(best).decode()}"


def _ribbon(tokens: Iterable[TokenRun]) -> str:
    """The sequence as a bar, each part as wide as its tokens."""
    parts: list[list] = []  # [colour, tokens]
    for run in tokens:
        colour = _COLOURS.get(run.kind, "#3fa35f" if run.supervised else "transparent")
        if parts and parts[-1][0] == colour:
            parts[-1][1] += len(run.ids)
        else:
            parts.append([colour, len(run.ids)])
    bars = "".join(f'<i style="flex:{count};background:{colour}"></i>' for colour, count in parts)
    return f'<div class="ribbon" title="the sequence, to scale">{bars}</div>'


def _token(run: TokenRun) -> str:
    title = f"id {run.ids[0]}" if len(set(run.ids)) == 1 else "ids " + " ".join(map(str, run.ids))
    if run.kind in ("image", "latent"):
        return f'<span class="{run.kind}" title="{title}">{escape(run.label)}</span>'
    classes = " ".join(["t", *(["s"] if run.supervised else []), *(["m"] if run.kind == "marker" else [])])
    text = escape(run.text).replace("\n", '<span class="nl">↵</span>\n')
    return f'<span class="{classes}" title="{title}{"" if run.supervised else ", no loss"}">{text}</span>'


def page_title(folder: str, previews: int) -> str:
    """A heading for a page of `previews` samples."""
    return f"{one_line(folder)}: {previews} sample{'' if previews == 1 else 's'}"
