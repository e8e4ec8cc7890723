"""For the site: what pages link to beside `docs/`, such as a table in `results/`, is part of it."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.docs_dir).parent
    pages = [file for file in files if file.is_documentation_page()]
    for target in sorted({path for page in pages for path in re.findall(r"\]\(\.\./([^)#]+)", page.content_string)}):
        files.append(File.generated(config, target, abs_src_path=str(root / target)))
    addresses = [file.dest_uri for file in files]
    if twice := {address for address in addresses if addresses.count(address) > 1}:
        raise PluginError(f"two files would be {', '.join(twice)}")
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """What lay beside `docs/` lies in it."""
    return markdown if "/" in page.file.src_path else markdown.replace("](../", "](").replace("](docs/", "](")
