"""What the widgets share: how arrays travel to the browser, and how a widget becomes a page of its own."""

from __future__ import annotations

import base64
import html
import json
import zlib
from pathlib import Path

import numpy as np

# No request leaves the page, and none of its data is ever run as code.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 1.5rem auto; max-width: 920px; padding: 0 1rem; font-family: system-ui, sans-serif; }}
h1 {{ font-size: 1.2rem; font-weight: 600; }}
{css}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<div id="widget"></div>
</main>
<script type="application/json" id="state">{state}</script>
<script type="module">
{code}
// What Jupyter's widget model does for the widget, without Jupyter.
const revive = (_, value) => value?.base64 === undefined ? value : Uint8Array.from(atob(value.base64), (c) => c.charCodeAt(0));
const state = JSON.parse(document.getElementById("state").textContent, revive);
const listeners = {{}};
const model = {{
  get: (key) => state[key],
  set(key, value) {{
    state[key] = value;
    for (const listener of listeners[`change:${{key}}`] ?? []) listener();
  }},
  save_changes() {{}},
  send() {{}},
  on: (event, listener) => (listeners[event] ??= []).push(listener),
  off() {{}},
}};
widget.render({{ model, el: document.getElementById("widget") }});
</script>
</body>
</html>
"""


def pack(array: np.ndarray) -> bytes:
    """A uint8 array as gzip, which browsers unpack by themselves; the fastest level, since local connections are fast."""
    compressor = zlib.compressobj(level=1, wbits=31)
    return compressor.compress(np.ascontiguousarray(array, np.uint8)) + compressor.flush()


def script(name: str) -> str:
    """One of this folder's scripts, with what they all share in front: an ES module without imports, as notebooks need it."""
    here = Path(__file__).parent
    return (here / "shared.js").read_text(encoding="utf-8") + "\n" + (here / name).read_text(encoding="utf-8")


def page(*, title: str, state: dict, script: str, css: Path) -> str:
    """A self-contained page that runs a widget without a kernel or a network.

    Args:
        title: heading of the page, plain text.
        state: value of each trait that the script reads: JSON types, and bytes, at any depth.
        script: ES module that ends in `export default widget;`, where `widget.render({model, el})` draws it.
        css: its style sheet.
    """
    code = script.replace("export default widget;", "")
    data = json.dumps(state, default=_bytes_as_base64, allow_nan=False, ensure_ascii=True)
    data = data.replace("<", "\\u003c")  # a name such as "</script>" must not end the element
    return _PAGE.format(title=html.escape(title), css=css.read_text(encoding="utf-8"), state=data, code=code)


def _bytes_as_base64(value: object) -> dict:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} cannot be written into a page")
