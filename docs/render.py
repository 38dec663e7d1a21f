"""Make web pages of docs/, which work from a folder and from a server.

    python docs/render.py site

Pages are Markdown as GitHub shows it, and need no network. A link to a file that is no page leads to where it lies in
the repository, beside which `site` is.
"""

import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token

DOCS = Path(__file__).parent
MARKDOWN = MarkdownIt("commonmark").enable("table")


def render(source: Path, target: Path) -> str:
    """The page of a Markdown file, to lie at `target` in the site."""
    tokens = MARKDOWN.parse(source.read_text("utf-8"))
    title = next(b.content for a, b in pairwise(tokens) if a.type == "heading_open")
    for token in _all(tokens):
        if token.type == "link_open":
            token.attrs["href"] = _page(str(token.attrs["href"]))
        if token.type == "code_inline" or (token.type == "fence" and not token.info):
            token.type, token.content = "html_inline", _code(token)
        if token.type == "heading_open":
            token.attrs["id"] = _anchor(tokens[tokens.index(token) + 1].content)
    body = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    home = "../" * (len(target.parts) - 1)
    top = "" if str(target) == "index.html" else f'<nav><a href="{home}index.html">mla_moe docs</a></nav>'
    return PAGE.format(title=title.replace("`", ""), top=top, body=body)


def _code(token: Token) -> str:
    """Lines break between words, and not within a flag, or wherever they must; the rest of a line is indented."""
    words = re.sub(r"(?<!\S)\S{1,40}(?!\S)", r"<span>\g<0></span>", escapeHtml(token.content))
    if token.type != "fence":
        return f"<code>{words}</code>"
    return f"<pre><code>{''.join(f'<div>{line}</div>' for line in words.splitlines())}</code></pre>\n"


def _anchor(heading: str) -> str:
    """As GitHub names it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _page(link: str) -> str:
    path, hash_, place = link.partition("#")
    if "://" in link or path.startswith("../"):
        return link
    path = re.sub(r"(^|/)README\.md$", r"\1index.html", path)
    return re.sub(r"\.md$", ".html", path) + hash_ + place


def _all(tokens: list[Token]):
    for token in tokens:
        yield token
        yield from _all(token.children or [])


def main(site: Path) -> None:
    for path in sorted(DOCS.rglob("*")):
        target = path.relative_to(DOCS)
        if path.suffix == ".md":
            target = Path(_page(target.as_posix()))
            (site / target).parent.mkdir(parents=True, exist_ok=True)
            (site / target).write_text(render(path, target), "utf-8")
        elif path.suffix == ".svg":
            (site / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, site / target)


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; --ink: #1c2733; --soft: #5b6876; --line: #dde3e9; --page: #fff; --box: #f5f7f9;
  --link: #1f66a8 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #dfe6ed; --soft: #9aa7b4; --line: #303a45; --page: #14191f; --box: #1c232b; --link: #7cb6ea }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; padding: 1rem 1rem 4rem; max-width: 46rem; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word }}
nav {{ font-size: .9rem }}
h1 {{ margin: .75rem 0 1rem; font-size: 1.75rem; line-height: 1.2 }}
h2 {{ margin: 2.5rem 0 .75rem; font-size: 1.25rem }}
a {{ color: var(--link); text-decoration-thickness: 1px; text-underline-offset: .3em }}
code {{ font: .86em ui-monospace, monospace; padding: .1em .25em; border-radius: 4px; background: var(--box) }}
pre {{ padding: .8rem .9rem; border-radius: 8px; background: var(--box); overflow-x: auto; line-height: 1.45 }}
pre code {{ padding: 0; font-size: 13px; line-height: 1.5 }}
pre code:not([class]) {{ white-space: pre-wrap; overflow-wrap: anywhere }}
code span {{ white-space: nowrap }} code div {{ padding-left: 1.5em; text-indent: -1.5em }}
img {{ display: block; width: 100%; max-width: 460px; margin: 1rem auto 1.25rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-size: .94rem }}
thead:not(:has(th:not(:empty))) {{ display: none }}
th, td {{ padding: .4rem 1.2rem .4rem 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line) }}
th {{ color: var(--soft); font-weight: normal }}
@media (max-width: 600px) {{ th, td {{ padding-right: .7rem }} }}
</style></head><body>{top}
{body}</body></html>
"""

if __name__ == "__main__":
    main(Path(sys.argv[1]))
