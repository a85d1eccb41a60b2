"""Let the site's pages link to files of the clone that are not in docs/, as they do on GitHub.

mkdocs calls these (`hooks` in mkdocs.yml). The pages at the top of the clone become pages of the
site, the README its start page; any other file that a page links to becomes a page that shows it,
and a notebook a page with its text and code.
Pictures in two colours, `<picture>` on GitHub, become two images, of which the theme shows one.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, Files, InclusionLevel

DOCS = "docs/"
TOP_PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
LOOKED_UP = ("reference/messages.md", "reference/settings.md")
"""Pages that the search prefers: who pastes a message or a key wants these."""
_MOST_BYTES = 2**18
"""Size of the largest file that becomes a page, in bytes."""
_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )(?!\w+:|#)([^)#\s]+)", re.MULTILINE)
_PICTURE = re.compile(
    r'<picture>.*?srcset="([^"]+)".*?alt="([^"]+)" src="([^"]+)".*?</picture>', re.S
)


def on_files(files, config):
    """Add the pages."""
    root = Path(config.config_file_path).parent
    for name in TOP_PAGES:
        if (root / name).exists():
            files.append(File.generated(config, name, abs_src_path=str(root / name)))
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        uri = file.src_uri.replace(".ipynb", ".md")
        files.append(File.generated(config, uri, content=_notebook_page(file.content_string)))
    for page in list(files.documentation_pages()):
        for _, link in _LINK.findall(page.content_string):
            path = _path_in_clone(page.src_uri, link)
            uri = _uri_of(path)
            if uri.startswith("source/") and uri not in files.src_uris and _is_shown(root, path):
                text = _source_page(path, (root / path).read_text(encoding="utf-8"))
                level = InclusionLevel.NOT_IN_NAV
                files.append(File.generated(config, uri, content=text, inclusion=level))
    return files


def on_page_markdown(markdown, page, config, files: Files):
    """Let links lead to the pages."""

    def link(match: re.Match[str]) -> str:
        uri = _uri_of(_path_in_clone(page.file.src_uri, match[2]))
        if files.get_file_from_path(uri) is None:
            return match[0]  # mkdocs reports it
        return match[1] + posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")

    if page.file.src_uri in LOOKED_UP:
        page.meta["search"] = {"boost": 3}
    if page.file.src_uri.startswith("source/"):
        return markdown
    markdown = _PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", markdown)
    return _LINK.sub(link, markdown)


def _path_in_clone(page: str, link: str) -> str:
    folder = "" if page in TOP_PAGES else posixpath.join(DOCS, posixpath.dirname(page))
    return posixpath.normpath(posixpath.join(folder, link))


def _uri_of(path: str) -> str:
    """The site's page, or image, for a file of the clone."""
    if path == "README.md":
        return "index.md"
    if path in TOP_PAGES:
        return path
    if path.startswith(DOCS) and path.endswith((".md", ".png", ".svg", ".ipynb")):
        return path.removeprefix(DOCS).replace(".ipynb", ".md")
    return f"source/{path}.md"


def _is_shown(root: Path, path: str) -> bool:
    """Return True for a short text of the clone: what lies outside is nobody's to publish."""
    if path.startswith(("../", "/")) or not (root / path).is_file():
        return False
    if (root / path).stat().st_size > _MOST_BYTES:
        return False
    try:
        (root / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _source_page(path: str, text: str) -> str:
    language = Path(path).suffix.removeprefix(".")
    fence = "`" * 5
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\n---\n"
    return f"{head}# `{path}`\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _notebook_page(text: str) -> str:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    return "\n\n".join(
        source if kind == "markdown" else f"```python\n{source}\n```" for kind, source in cells
    )
