"""Checks the built site: links, anchors, nothing from elsewhere, and a real browser.

    python docs/check_site.py out/site

Every link into the site and every anchor must be there, no page may load anything from
another host, and no formula or reference of a docstring may be left as markup. Where
Chromium is installed, it opens each page: nothing may be written to its console,
pictures and formulas must have a size, and a search must find its word. Where it is
not, that part is said to be skipped.
"""

import contextlib
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src"}
# Counts what has no size, after all has been loaded, and says so in the title.
_LOOK = """<script>addEventListener("load", () => setTimeout(() => {
  const flat = [...document.querySelectorAll("article img, article math")]
    .filter(e => e.getBoundingClientRect().height < 4 || e.naturalWidth === 0);
  document.title = "LOOKED " + flat.length;
}, 50));</script></body>"""


_WAIT = '<img src="wait.svg" alt=""></body>'


# Roles and directives of docstrings, TeX that was not converted, and what the converter
# does not know: it hands commands and the & of columns on as they are.
_RAW = re.compile(
    r":(?:func|class|meth|mod|data|attr|math):|\.\. math::|::\s*</p>|\\[(\[]"
    r"|<m[io]>(?:\\\w+|&(?:amp;)?)</m[io]>"
)


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if LOADED.get(tag) in found:
            self.loads.append(found[LOADED[tag]])
        if tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(found["href"])


def wrong_links(site: Path) -> list[str]:
    """Links and anchors that lead nowhere, and what is loaded from elsewhere."""
    pages = {path: Page(path.read_text()) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        here = path.relative_to(site)
        for link in page.links + page.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loads and parts.scheme != "data":
                    wrong.append(f"{here} loads {link}")
                continue
            target = path
            if parts.path:
                folder = site if parts.path.startswith("/") else path.parent
                target = (folder / unquote(parts.path).lstrip("/")).resolve()
                if target.is_dir():
                    target /= "index.html"
            if not target.exists():
                wrong.append(f"{here} links to {link}, which is not there")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].anchors | {"__top"}
            ):
                wrong.append(f"{here} links to {link}, which has no such anchor")
    return wrong


def wrong_formulas(site: Path) -> list[str]:
    """Markup that has not become a formula or a link, where a reader would see it."""
    wrong = []
    for path in site.rglob("*.html"):
        # Code may hold anything.
        text = re.sub(r"<(code|script|title).*?</\1>", "", path.read_text(), flags=re.S)
        for found in _RAW.findall(text):
            wrong.append(f"{path.relative_to(site)} shows the markup {found}")
        # The pages of docstrings; that of the arguments is a table of ranges.
        if path.parent.name == "reference" and path.stem not in ("index", "arguments"):
            formulas = text.count("<math")
            if formulas < 10:
                wrong.append(f"{path.relative_to(site)} has {formulas} formulas only")
    return wrong


def browse(browser: str, address: str) -> tuple[str, str]:
    """The document after its scripts have run, and what was written to the console."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [
                browser,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--enable-logging=stderr",
                f"--user-data-dir={profile}",
                *([] if "?q=" in address else ["--virtual-time-budget=6000"]),
                "--dump-dom",
                address,
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serves a folder to this machine alone, and gives its address."""
    handler = functools.partial(_Quiet, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/wait.svg":
            time.sleep(5)
            self.send_response(200)
            self.send_header("Content-Type", "image/svg+xml")
            self.end_headers()
            self.wfile.write(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def wrong_in_browser(browser: str, site: Path) -> list[str]:
    """What a reader would see go wrong, page by page, and in a search."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "site"
        shutil.copytree(site, copy)
        for path in copy.rglob("*.html"):
            path.write_text(path.read_text().replace("</body>", _LOOK))
        paths = [str(path.relative_to(copy)) for path in sorted(copy.rglob("*.html"))]
        # A search runs in a worker, for which the browser's virtual time does not wait:
        # this page is loaded only once the picture is there, which the server delays.
        index = (copy / "index.html").read_text().replace("</body>", _WAIT)
        (copy / "search.html").write_text(index)
        paths.append("search.html?q=warmup")
        with served(copy) as root, ThreadPoolExecutor(2) as pool:
            seen = list(pool.map(lambda path: browse(browser, root + path), paths))
    for here, (document, console) in zip(paths, seen, strict=True):
        if console:
            wrong.append(f"{here}: {console}")
        if "?q=" in here:
            if not re.search(r"md-search-result__item", document):
                wrong.append("a search for warmup finds nothing")
        elif "<title>LOOKED 0</title>" not in document:
            title = re.search("<title>(.*?)</title>", document, re.S)
            wrong.append(f"{here} shows a picture or formula without a size: {title}")
    return wrong


def main(site: Path) -> int:
    wrong = wrong_links(site) + wrong_formulas(site)
    found = list(filter(None, map(shutil.which, BROWSERS)))
    if found:
        wrong += wrong_in_browser(found[0], site)
    else:
        print("SKIPPED the browser: Chromium is not installed")
    print("\n".join(wrong) or f"{len(list(site.rglob('*.html')))} pages hold.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
