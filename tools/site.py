"""Hooks of ``mkdocs.yml``: pages outside ``docs``, and links to files that are not pages.

The README is the site's first page. Links are written for the repository: a link to a page is
adapted to the site, and a link to another file becomes the file's name.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.structure.files import File

PAGES = {"README.md": "index.md"} | {
    name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
}
"""File in the repository's root -> page of the site."""

_LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<path>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    root = Path(config.docs_dir).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(root / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = {to: source for source, to in PAGES.items()}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def adapt(link: re.Match[str]) -> str:
        target = normpath(str(PurePosixPath(here).parent / link["path"]))
        page_of_target = PAGES.get(target, target.removeprefix("docs/"))
        if target not in PAGES and not target.startswith("docs/"):
            return f"`{target}`"
        path = relpath(page_of_target, PurePosixPath(page.file.src_uri).parent)
        return f"{link['text']}({path}{link['anchor'] or ''})"

    return _LINK.sub(adapt, markdown)
